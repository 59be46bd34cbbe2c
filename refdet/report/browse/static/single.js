// The single view: one image large, once for each store, with its sentences and the list of its regions.

import { categoryName } from "./grid.js";
import { count, download, element, number } from "./dom.js";
import { address, reaches, ROOT } from "./state.js";
import { Viewer } from "./viewer.js";

export class Single {
  // `go` shows another state; `total` is the length of the list that the image is in, null if unknown.
  constructor(main, data, state, about, go, total) {
    Object.assign(this, { main, data, state, about, go, total });
    this.sides = data.stores.map((store, number) => this.side(store, number));
    this.build();
    this.update(state);
    this.loadImage();
  }

  // Show what has been computed meanwhile, with the zoom as it is.
  refresh(data) {
    this.data = data;
    this.sides.forEach((side, number) => { side.store = data.stores[number]; });
    this.update(this.state);
  }

  side(store, number) {
    const label = `Image ${this.data.name} with the regions of ${store.path}`;
    const [height, width] = store.size ?? [this.data.height, this.data.width];
    return { store, number, viewer: new Viewer([width, height], label, (hovered) => this.hover(number, hovered)) };
  }

  async loadImage() {
    this.say(this.data.missing);
    if (this.data.missing) return;
    try {
      const response = await fetch(`${ROOT}image/${this.data.position}`);
      if (!response.ok) throw new Error((await response.json()).error);
      const bitmap = await createImageBitmap(await response.blob());
      for (const side of this.sides) side.viewer.setImage(bitmap);
    } catch (error) {
      this.say(`The image cannot be shown: ${error.message}`);
    }
  }

  say(text) {
    this.problem.textContent = text;
    this.problem.hidden = !text;
  }

  build() {
    const { data, about, state, go } = this;
    const button = (text, action, attributes = {}) => element("button", { type: "button", onclick: action, ...attributes }, text);
    this.problem = element("p", { class: "bad", role: "status", hidden: true });
    this.toggles = Object.fromEntries(["masks", "boxes", "labels"].map((name) =>
      [name, button(name[0].toUpperCase() + name.slice(1), () => this.toggle(name), { "aria-pressed": "false" })]));
    this.toggles.masks.disabled = !about.masks;
    if (!about.masks) this.toggles.masks.title = "Neither the store nor the referents have masks";
    const back = { ...state, image: "", ref: "", at: "", page: "" };
    const at = state.at === "" ? null : Number(state.at);
    this.bar = element("nav", { class: "pages", "aria-label": "Image" },
      element("a", { class: "button", href: address(back), onclick: (event) => go(this.backState(), event) }, "Back to grid"),
      button("Previous", () => this.step(-1), { disabled: at === null || at === 0 }),
      button("Next", () => this.step(1), { disabled: at === null || (this.total !== null && at + 1 >= this.total) }),
      element("span", {}, at === null || this.total === null ? "" : `${at + 1} of ${this.total.toLocaleString("en")}`),
      ...Object.values(this.toggles),
      button("Zoom in", () => this.zoom(1.5)), button("Zoom out", () => this.zoom(1 / 1.5)), button("Fit", () => this.fit()),
      button("Download PNG", () => this.png()),
    );
    const views = this.sides.map((side) => {
      side.title = element("figcaption", {});
      side.list = element("ol", { class: "regions", tabindex: "0", "aria-label": `Regions of ${side.store.path}` });
      return element("figure", {}, side.title, side.viewer.canvas, element("details", { open: this.sides.length === 1 },
        element("summary", {}, "Regions"), side.list));
    });
    this.objects = element("section", { class: "objects", "aria-label": "Referents" });
    const facts = `image ${data.image_id}, ${data.width} × ${data.height}`;
    this.main.replaceChildren(
      element("h2", { class: "name" }, data.name || `image ${data.image_id}`, " ", element("small", {}, facts)),
      this.bar, this.problem,
      data.error ? element("p", { class: "bad" }, `The extraction failed on this image: ${data.error}`) : "",
      element("div", { class: "columns" }, element("div", { class: this.sides.length > 1 ? "two" : "one" }, ...views), this.objects),
    );
  }

  backState() {
    const at = Number(this.state.at || 0);
    return { ...this.state, image: "", ref: "", at: "", page: at >= 60 ? String(Math.floor(at / 60)) : "" };
  }

  step(by) {
    if (this.state.at === "") return;
    const at = Number(this.state.at) + by;
    if (at >= 0 && (this.total === null || at < this.total)) this.go({ ...this.state, at: String(at), image: "?", ref: "" });
  }

  toggle(name) {
    if (name === "masks" && !this.about.masks) return this.say("Neither the store nor the referents have masks.");
    this.go({ ...this.state, [name]: this.state[name] === "1" ? "0" : "1" }, null, true);
  }

  zoom(factor) {
    for (const side of this.sides) side.viewer.zoomBy(factor);
  }

  fit() {
    for (const side of this.sides) side.viewer.reset();
  }

  png() {
    const [first] = this.sides, width = this.sides.reduce((sum, side) => sum + side.viewer.canvas.width, 0);
    const whole = element("canvas");
    whole.width = width;
    whole.height = Math.max(...this.sides.map((side) => side.viewer.canvas.height));
    let x = 0;
    for (const { viewer } of this.sides) {
      whole.getContext("2d").drawImage(viewer.canvas, x, 0);
      x += viewer.canvas.width;
    }
    whole.toBlob((blob) => download(blob, `refdet-${this.data.image_id}-${first.viewer.canvas.width}.png`), "image/png");
  }

  hover(number, hovered) {
    const side = this.sides[number];
    if (side.hovered === hovered) return;
    side.hovered = hovered;
    this.draw(side);
    for (const entry of side.list.children) entry.classList.toggle("hovered", Number(entry.dataset.index) === hovered);
  }

  // Draw for another state of the same image.
  update(state) {
    this.state = state;
    for (const [name, button] of Object.entries(this.toggles)) button.setAttribute("aria-pressed", String(state[name] === "1"));
    this.showObjects();
    for (const side of this.sides) {
      this.draw(side);
      this.list(side);
    }
  }

  shown(side) {
    const indexed = side.store.regions.map((region, index) => ({
      ...region, index, label: `${categoryName(this.about.names.stores[side.number], region.category)} ${number(region.score)}`.trim(),
    }));
    indexed.sort((a, b) => b.score - a.score || a.index - b.index);
    const most = this.state.top === "" ? indexed.length : Number(this.state.top);
    return indexed.slice(0, most).filter((region) => reaches(region.score, this.state));
  }

  chosen() {
    return this.data.objects.find((object) => String(object.key) === this.state.ref) ?? null;
  }

  draw(side) {
    const marks = [], object = this.chosen(), own = side.store.regions;
    const [height, width] = side.store.size ?? [], fits = height === this.data.height && width === this.data.width;
    if (!object) for (const one of this.data.annotations) marks.push({ box: one.box, kind: "annotation", label: categoryName(this.about.names.annotations, one.category) });
    for (const one of object ? [object] : this.data.annotations.length ? [] : this.data.objects) {
      if (object && object.best[side.number] !== null) {
        const best = own[object.best[side.number]];
        if (best) marks.push({ box: best.box, kind: "best", label: `best region, IoU ${number(object.iou[side.number])}`, mask: best.mask });
      }
      if (object) for (const sentence of side.number ? [] : object.sentences) {
        const [kind, label] = sentence.wrong ? ["answer", "incorrect prediction"] : ["right", "correct prediction"];
        for (const [i, box] of sentence.answer.entries()) {
          const same = marks.some((mark) => mark.kind === kind && String(mark.box) === String(box) && mark.mask === sentence.answer_masks[i]);
          if (!same) marks.push({ box, kind, label, mask: sentence.answer_masks[i] });
        }
      }
      one.boxes.forEach((box, i) => marks.push({ box, kind: "referent", label: one.label, mask: fits && !i ? one.mask : "" }));
    }
    const { masks, boxes, labels } = this.state;
    side.viewer.show({
      regions: this.shown(side), marks, hovered: side.hovered ?? null, faint: Boolean(object),
      masks: masks === "1", boxes: boxes === "1", labels: labels === "1",
    });
  }

  list(side) {
    const { store } = side, shown = this.shown(side);
    const hidden = store.regions.length - shown.length;
    side.title.textContent = store.absent || `${store.path}: ${count(shown.length, "region")}${hidden ? `, ${hidden} hidden by the sliders` : ""}${store.masks ? "" : ", no masks in this store"}`;
    side.list.replaceChildren(...shown.map((region) => element("li", {
      "data-index": region.index,
      onpointerenter: () => this.hover(side.number, region.index),
      onpointerleave: () => this.hover(side.number, null),
    }, `${region.label}, row ${region.row}`)));
  }

  showObjects() {
    const { data, about, state, go } = this;
    const entries = data.objects.map((object) => {
      const chosen = String(object.key) === state.ref;
      const there = { ...state, ref: chosen ? "" : String(object.key) };
      const ious = about.stores.map((store, i) => `${about.stores.length > 1 ? `${store.name}: ` : ""}${object.iou[i] === null ? (about.index.stage ? "not computed yet" : "unknown") : number(object.iou[i], 3)}`);
      return element("article", { class: chosen ? "chosen" : "" },
        element("a", { href: address(there), onclick: (event) => go(there, event, true), "aria-current": chosen ? "true" : null },
          `${object.label} ${categoryName(about.names.referents, object.category)} ${object.size ?? ""} ${object.split}`),
        element("p", { class: object.iou[0] !== null && object.iou[0] < 0.5 ? "bad" : "" },
          object.boxes.length ? `IoU of the best region: ${ious.join(", ")}` : "no target"),
        object.iou[0] === 0 ? element("p", { class: "bad" }, `No region of ${about.stores[0].name} overlaps it.`) : "",
        object.mask_error ? element("p", { class: "bad" }, `Its mask cannot be shown: ${object.mask_error}`) : "",
        ...object.sentences.map((one) => element("p", {}, element("q", {}, one.text), answer(one, about))));
    });
    this.objects.replaceChildren(
      element("h3", {}, count(data.objects.length, "referent")),
      entries.length ? element("p", { class: "facts" }, this.chosen() ? "Click it again to show all regions equally." : "Click one to see its best region and the predictions.") : "",
      ...entries,
      entries.length ? "" : element("p", {}, about.refs ? "No sentence refers to this image." : "No refs were given."));
  }
}

function answer(sentence, about) {
  if (!about.predictions || sentence.wrong === null) return "";
  const text = sentence.wrong ? (sentence.answer.length ? "incorrect" : "no prediction") : "correct";
  const iou = sentence.iou === null ? "" : `, IoU ${number(sentence.iou)}`;
  return element("small", { class: sentence.wrong ? "bad" : "good" }, ` ${text}${iou}`);
}
