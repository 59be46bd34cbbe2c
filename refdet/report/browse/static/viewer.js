// One canvas with an image, masks, boxes and labels; zoom by the wheel or keys, pan by dragging.

import { ANNOTATION, ANSWER, BEST, colorOf, REFERENT, rgbOf, rgbOfHex, RIGHT_ANSWER } from "./colors.js";
import { element } from "./dom.js";
import { paint } from "./rle.js";

const MOST_ZOOM = 20;
// in the order in which they get places for their labels
const MARKS = { referent: REFERENT, best: BEST, answer: ANSWER, right: RIGHT_ANSWER, annotation: ANNOTATION };

export class Viewer {
  // `size` is [width, height] of the image in pixels; `onhover` gets the index of a region or null.
  constructor(size, label, onhover) {
    [this.width, this.height] = size;
    this.zoom = 1;
    this.x = this.y = 0; // of the image's point in the upper left corner
    this.scene = { regions: [], marks: [], hovered: null };
    this.image = null;
    this.taken = []; // places of labels [left, top, right, bottom]
    this.masks = null;
    this.canvas = element("canvas", { role: "img", "aria-label": label, class: "picture" });
    this.canvas.width = Math.min(1600, Math.max(this.width, 900));
    this.canvas.height = Math.max(1, Math.round((this.canvas.width * this.height) / this.width));
    this.canvas.style.width = `min(100%, ${Math.round((75 * this.width) / this.height)}vh)`;
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const [x, y] = this.pointOf(event);
      this.zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2, x, y);
    }, { passive: false });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    let dragged = null;
    this.canvas.addEventListener("pointerdown", (event) => {
      dragged = [event.clientX, event.clientY];
      this.canvas.setPointerCapture(event.pointerId);
    });
    this.canvas.addEventListener("pointerup", () => { dragged = null; });
    this.canvas.addEventListener("pointermove", (event) => {
      if (dragged) {
        const scale = this.width / this.zoom / this.canvas.clientWidth;
        this.moveTo(this.x - (event.clientX - dragged[0]) * scale, this.y - (event.clientY - dragged[1]) * scale);
        dragged = [event.clientX, event.clientY];
      } else onhover(this.regionAt(...this.pointOf(event)));
    });
    this.canvas.addEventListener("pointerleave", () => onhover(null));
  }

  pointOf(event) {
    const frame = this.canvas.getBoundingClientRect();
    return [
      this.x + ((event.clientX - frame.left) / frame.width) * (this.width / this.zoom),
      this.y + ((event.clientY - frame.top) / frame.height) * (this.height / this.zoom),
    ];
  }

  // The smallest shown region at a point.
  regionAt(x, y) {
    let best = null, least = Infinity;
    for (const region of this.scene.regions) {
      const [x1, y1, x2, y2] = region.box, area = (x2 - x1) * (y2 - y1);
      if (x >= x1 && x < x2 && y >= y1 && y < y2 && area < least) [best, least] = [region.index, area];
    }
    return best;
  }

  zoomBy(factor, x = this.x + this.width / this.zoom / 2, y = this.y + this.height / this.zoom / 2) {
    const zoom = Math.min(MOST_ZOOM, Math.max(1, this.zoom * factor));
    const left = x - ((x - this.x) * this.zoom) / zoom, top = y - ((y - this.y) * this.zoom) / zoom;
    this.zoom = zoom;
    this.moveTo(left, top);
  }

  moveTo(x, y) {
    this.x = Math.min(Math.max(0, x), this.width - this.width / this.zoom);
    this.y = Math.min(Math.max(0, y), this.height - this.height / this.zoom);
    this.draw();
  }

  reset() {
    this.zoom = 1;
    this.moveTo(0, 0);
  }

  setImage(image) {
    this.image = image;
    this.draw();
  }

  // `scene`: regions {index, box, category, label, mask}, marks {box, kind, label, mask}, masks, boxes, labels, hovered,
  // and `faint` where the marks are to stand out: regions are then drawn faintly, without masks and labels.
  show(scene) {
    const { regions, marks, masks } = scene;
    const key = masks ? JSON.stringify([regions.map((region) => region.index), marks.map((mark) => [mark.kind, mark.mask])]) : "";
    if (this.masks === null || this.masks.key !== key) {
      const painted = scene.faint ? [] : regions.map((region) => [region.mask, rgbOf(region.category)]);
      const above = marks.map((mark) => [mark.mask, rgbOfHex(MARKS[mark.kind])]);
      this.masks = { key, layer: masks ? this.layer([...painted, ...above]) : null };
    }
    this.scene = scene;
    this.draw();
  }

  // A canvas with masks [text, [r, g, b]], the last on top.
  layer(painted, alpha = 0.5) {
    const layer = element("canvas");
    [layer.width, layer.height] = [this.width, this.height];
    const context = layer.getContext("2d");
    const data = context.createImageData(this.width, this.height);
    for (const [mask, color] of painted) if (mask) paint(data.data, mask, this.height, this.width, color, alpha);
    context.putImageData(data, 0, 0);
    return layer;
  }

  // Pixels of the canvas for one of the screen, so that lines and letters have one size everywhere.
  unit() {
    return this.canvas.width / (this.canvas.clientWidth || this.canvas.width);
  }

  draw() {
    const context = this.canvas.getContext("2d"), scale = (this.canvas.width / this.width) * this.zoom;
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.fillStyle = "#444";
    context.fillRect(0, 0, this.canvas.width, this.canvas.height);
    context.setTransform(scale, 0, 0, scale, -this.x * scale, -this.y * scale);
    context.imageSmoothingEnabled = scale < 4;
    if (this.image) context.drawImage(this.image, 0, 0, this.width, this.height);
    if (this.masks?.layer) context.drawImage(this.masks.layer, 0, 0);
    const { regions, marks, hovered } = this.scene;
    const one = regions.find((region) => region.index === hovered);
    if (one?.mask) context.drawImage(this.layer([[one.mask, rgbOf(one.category)]], 0.7), 0, 0);
    context.globalAlpha = this.scene.faint ? 0.4 : 1;
    if (this.scene.boxes) for (const region of regions) this.box(context, scale, region.box, colorOf(region.category), 1.5);
    context.globalAlpha = 1;
    for (const mark of marks) this.box(context, scale, mark.box, MARKS[mark.kind], mark.kind === "annotation" ? 1.5 : 3, mark.kind === "annotation");
    if (one) this.box(context, scale, one.box, "#fff", 3);
    this.taken = [];
    if (this.scene.labels) {
      for (const kind of Object.keys(MARKS)) for (const mark of marks.filter((one) => one.kind === kind)) this.label(context, scale, mark.box, mark.label, MARKS[mark.kind]);
      if (this.scene.boxes && !this.scene.faint) for (const region of regions) this.label(context, scale, region.box, region.label);
    }
    this.taken = [];
    if (one) this.label(context, scale, one.box, one.label, "#fff");
  }

  box(context, scale, [x1, y1, x2, y2], color, width, dashed = false) {
    const unit = this.unit() / scale;
    context.setLineDash(dashed ? [6 * unit, 4 * unit] : []);
    for (const [style, extra] of [["rgba(0,0,0,.7)", 2], [color, 0]]) {
      context.strokeStyle = style;
      context.lineWidth = (width + extra) * unit;
      context.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
    context.setLineDash([]);
  }

  // Above the box, else inside, else below it, left or right, where no earlier label is; left out without such a place.
  label(context, scale, [x1, y1, x2, y2], text, color = "#fff") {
    const seen = x2 > this.x && y2 > this.y && x1 < this.x + this.width / this.zoom && y1 < this.y + this.height / this.zoom;
    if (!text || !seen) return;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    const unit = this.unit(), line = 18 * unit, edge = 4 * unit;
    context.font = `${13 * unit}px system-ui, sans-serif`;
    const width = context.measureText(text).width + 2 * edge;
    const within = (value, most) => Math.min(Math.max(0, value), Math.max(0, most));
    const lefts = [(x1 - this.x) * scale, (x2 - this.x) * scale - width].map((x) => within(x, this.canvas.width - width));
    const tops = [(y1 - this.y) * scale - line, (y1 - this.y) * scale, (y2 - this.y) * scale].map((y) => within(y, this.canvas.height - line));
    const free = ([x, y]) => this.taken.every(([left, top, right, bottom]) => x >= right || x + width <= left || y >= bottom || y + line <= top);
    const place = lefts.flatMap((x) => tops.map((y) => [x, y])).find(free);
    if (place) {
      const [x, y] = place;
      this.taken.push([x, y, x + width, y + line]);
      context.fillStyle = "rgba(0,0,0,.8)";
      context.fillRect(x, y, width, line);
      context.fillStyle = color;
      context.fillText(text, x + edge, y + 13 * unit);
    }
    context.restore();
  }
}
