// One canvas with an image, masks, boxes and labels; zoom by the wheel or keys, pan by dragging.

import { ANNOTATION, ANSWER, BEST, colorOfCategory, CORRECT_ANSWER, REFERENT, rgbOfCategory, rgbOfHex } from "./colors.js";
import { element } from "./dom.js";
import { paintMask } from "./rle.js";

const MAX_ZOOM = 20;
// Colors of the kinds of marks, in the order in which their labels are placed.
const MARKS = { referent: REFERENT, best: BEST, answer: ANSWER, correct: CORRECT_ANSWER, annotation: ANNOTATION };

export class Viewer {
  // `size` is [width, height] of the image in pixels; `onhover` gets the index of a region or null.
  constructor(size, label, onhover) {
    [this.width, this.height] = size;
    this.zoom = 1;
    this.x = this.y = 0; // the point of the image that is in the upper left corner of the canvas, in image pixels
    this.scene = { regions: [], marks: [], hovered: null };
    this.image = null;
    this.labelRects = []; // labels drawn so far, [left, top, right, bottom] in canvas pixels
    this.masks = null; // {key, layer}: a canvas with the masks of the scene, and what it was drawn from
    this.canvas = element("canvas", { role: "img", "aria-label": label, class: "picture" });
    this.canvas.width = Math.min(1600, Math.max(this.width, 900)); // large enough for legible labels, small enough to draw fast
    this.canvas.height = Math.max(1, Math.round((this.canvas.width * this.height) / this.width));
    this.canvas.style.width = `min(100%, ${Math.round((75 * this.width) / this.height)}vh)`;
    this.canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      const [x, y] = this.pointOf(event);
      this.zoomBy(event.deltaY < 0 ? 1.2 : 1 / 1.2, x, y);
    }, { passive: false });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    let dragged = null; // [x, y] of the pointer while it drags
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

  // The point of the image under the pointer, in image pixels.
  pointOf(event) {
    const frame = this.canvas.getBoundingClientRect();
    return [
      this.x + ((event.clientX - frame.left) / frame.width) * (this.width / this.zoom),
      this.y + ((event.clientY - frame.top) / frame.height) * (this.height / this.zoom),
    ];
  }

  // Index of the smallest shown region at a point, null if there is none.
  regionAt(x, y) {
    let smallest = null, minArea = Infinity;
    for (const region of this.scene.regions) {
      const [x1, y1, x2, y2] = region.box, area = (x2 - x1) * (y2 - y1);
      if (x >= x1 && x < x2 && y >= y1 && y < y2 && area < minArea) [smallest, minArea] = [region.index, area];
    }
    return smallest;
  }

  // Zoom by a factor and keep the point (x, y) of the image, by default the middle of the view, where it is.
  zoomBy(factor, x = this.x + this.width / this.zoom / 2, y = this.y + this.height / this.zoom / 2) {
    const zoom = Math.min(MAX_ZOOM, Math.max(1, this.zoom * factor));
    const left = x - ((x - this.x) * this.zoom) / zoom, top = y - ((y - this.y) * this.zoom) / zoom;
    this.zoom = zoom;
    this.moveTo(left, top);
  }

  // Show the point (x, y) of the image in the upper left corner, or the nearest that leaves no margin.
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

  // Draw a scene. It has lists of `regions` {index, box, category, label, mask} and of `marks` {box, kind, label, mask};
  // `masks`, `boxes` and `labels`, whether to draw each of these; `hovered`, the index of a region or null; and `faint`,
  // whether to draw the regions faintly, without masks and labels, so that the marks stand out.
  show(scene) {
    const { regions, marks, masks, faint } = scene;
    const withMasks = faint ? [] : regions;
    const key = masks ? JSON.stringify([withMasks.map((region) => region.index), marks.map((mark) => [mark.kind, mark.mask])]) : "";
    if (this.masks === null || this.masks.key !== key) {
      const ofRegions = withMasks.map((region) => [region.mask, rgbOfCategory(region.category)]);
      const ofMarks = marks.map((mark) => [mark.mask, rgbOfHex(MARKS[mark.kind])]);
      this.masks = { key, layer: masks ? this.createLayer([...ofRegions, ...ofMarks]) : null };
    }
    this.scene = scene;
    this.draw();
  }

  // A canvas with the masks of a list of [RLE, [r, g, b]], the last on top; entries without an RLE are skipped.
  createLayer(painted, alpha = 0.5) {
    const layer = element("canvas");
    [layer.width, layer.height] = [this.width, this.height];
    const context = layer.getContext("2d");
    const data = context.createImageData(this.width, this.height);
    for (const [mask, color] of painted) if (mask) paintMask(data.data, mask, this.height, this.width, color, alpha);
    context.putImageData(data, 0, 0);
    return layer;
  }

  // Canvas pixels per CSS pixel: lines and text are drawn in multiples of it, to have the same size on every screen.
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
    const target = regions.find((region) => region.index === hovered);
    if (target?.mask) context.drawImage(this.createLayer([[target.mask, rgbOfCategory(target.category)]], 0.7), 0, 0);
    context.globalAlpha = this.scene.faint ? 0.4 : 1;
    if (this.scene.boxes) for (const region of regions) this.box(context, scale, region.box, colorOfCategory(region.category), 1.5);
    context.globalAlpha = 1;
    for (const mark of marks) {
      const isAnnotation = mark.kind === "annotation";
      this.box(context, scale, mark.box, MARKS[mark.kind], isAnnotation ? 1.5 : 3, isAnnotation);
    }
    if (target) this.box(context, scale, target.box, "#fff", 3);
    this.labelRects = [];
    if (this.scene.labels) {
      for (const kind of Object.keys(MARKS)) {
        for (const mark of marks) if (mark.kind === kind) this.label(context, scale, mark.box, mark.label, MARKS[kind]);
      }
      if (this.scene.boxes && !this.scene.faint) for (const region of regions) this.label(context, scale, region.box, region.label);
    }
    this.labelRects = []; // the label of the hovered region may cover others
    if (target) this.label(context, scale, target.box, target.label, "#fff");
  }

  // Draw a box, given in image pixels; `width` of its line is in CSS pixels.
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

  // Draw a label above, inside or below a box, at the left or right of the box, where it covers no earlier label; omit it
  // if there is no such place.
  label(context, scale, [x1, y1, x2, y2], text, color = "#fff") {
    const visible = x2 > this.x && y2 > this.y && x1 < this.x + this.width / this.zoom && y1 < this.y + this.height / this.zoom;
    if (!text || !visible) return;
    context.save();
    context.setTransform(1, 0, 0, 1, 0, 0);
    const unit = this.unit(), height = 18 * unit, padding = 4 * unit;
    context.font = `${13 * unit}px system-ui, sans-serif`;
    const width = context.measureText(text).width + 2 * padding;
    const clamp = (value, max) => Math.min(Math.max(0, value), Math.max(0, max));
    const lefts = [(x1 - this.x) * scale, (x2 - this.x) * scale - width].map((x) => clamp(x, this.canvas.width - width));
    const tops = [(y1 - this.y) * scale - height, (y1 - this.y) * scale, (y2 - this.y) * scale].map((y) => clamp(y, this.canvas.height - height));
    const isFree = ([x, y]) => this.labelRects.every(([left, top, right, bottom]) => x >= right || x + width <= left || y >= bottom || y + height <= top);
    const place = lefts.flatMap((x) => tops.map((y) => [x, y])).find(isFree);
    if (place) {
      const [x, y] = place;
      this.labelRects.push([x, y, x + width, y + height]);
      context.fillStyle = "rgba(0,0,0,.8)";
      context.fillRect(x, y, width, height);
      context.fillStyle = color;
      context.fillText(text, x + padding, y + 13 * unit);
    }
    context.restore();
  }
}
