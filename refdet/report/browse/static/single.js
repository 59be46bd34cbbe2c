// The view of a single image, large and once for each store, with its sentences and a list of its regions.

import { categoryName, isUncovered } from "./grid.js";
import { download, element, formatCount, formatNumber } from "./dom.js";
import { addressOf, PAGE_SIZE, reachesMinimum, ROOT } from "./state.js";
import { Viewer } from "./viewer.js";

export class Single {
  // `data` is the response to api/image, `about` that to api/about; `go` shows another state; `total` is the length of the
  // list that the image was opened from, null if it was opened by its address.
  constructor(main, data, state, about, go, total) {
    Object.assign(this, { main, data, state, about, go, total });
    this.sides = data.stores.map((store, index) => this.createSide(store, index));
    this.build();
    this.update(state);
    this.loadImage();
  }

  // Show a newer response to api/image, and keep the zoom.
  refresh(data) {
    this.data = data;
    this.sides.forEach((side, index) => { side.store = data.stores[index]; });
    this.update(this.state);
  }

  // A side: one store, its index and the canvas of the image with its regions.
  createSide(store, index) {
    const label = `Image ${this.data.name} with the regions of ${store.path}`;
    const [height, width] = store.size ?? [this.data.height, this.data.width];
    return { store, index, hovered: null, viewer: new Viewer([width, height], label, (region) => this.hover(index, region)) };
  }

  async loadImage() {
    this.showProblem(this.data.missing);
    if (this.data.missing) return;
    try {
      const response = await fetch(`${ROOT}image/${this.data.position}`);
      if (!response.ok) throw new Error((await response.json()).error);
      const bitmap = await createImageBitmap(await response.blob());
      for (const side of this.sides) side.viewer.setImage(bitmap);
    } catch (error) {
      this.showProblem(`The image cannot be shown: ${error.message}`);
    }
  }

  showProblem(text) {
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
    const at = state.at === "" ? null : Number(state.at);
    this.bar = element("nav", { class: "pages", "aria-label": "Image" },
      element("a", { class: "button", href: addressOf(this.backState()), onclick: (event) => go(this.backState(), event) }, "Back to grid"),
      button("Previous", () => this.step(-1), { disabled: at === null || at === 0 }),
      button("Next", () => this.step(1), { disabled: at === null || (this.total !== null && at + 1 >= this.total) }),
      element("span", {}, at === null || this.total === null ? "" : `${at + 1} of ${this.total.toLocaleString("en")}`),
      ...Object.values(this.toggles),
      button("Zoom in", () => this.zoom(1.5)), button("Zoom out", () => this.zoom(1 / 1.5)), button("Fit", () => this.fit()),
      button("Download PNG", () => this.savePng()),
    );
    const views = this.sides.map((side) => {
      side.title = element("figcaption", {});
      side.list = element("ol", { class: "regions", tabindex: "0", "aria-label": `Regions of ${side.store.path}` });
      return element("figure", {}, side.title, side.viewer.canvas, element("details", { open: this.sides.length === 1 },
        element("summary", {}, "Regions"), side.list));
    });
    this.referents = element("section", { class: "referents", "aria-label": "Referents" });
    const facts = `image ${data.image_id}, ${data.width} × ${data.height}`;
    this.main.replaceChildren(
      element("h2", { class: "name" }, data.name || `image ${data.image_id}`, " ", element("small", {}, facts)),
      this.bar, this.problem,
      data.error ? element("p", { class: "bad" }, `The extraction failed on this image: ${data.error}`) : "",
      element("div", { class: "columns" }, element("div", { class: this.sides.length > 1 ? "two" : "one" }, ...views), this.referents),
    );
  }

  // The state of the page of the grid that the image is on.
  backState() {
    const at = Number(this.state.at || 0);
    return { ...this.state, image: "", ref: "", at: "", page: at >= PAGE_SIZE ? String(Math.floor(at / PAGE_SIZE)) : "" };
  }

  // Go to the image `by` further in the list; "?" stands for its id, which `go` looks up.
  step(by) {
    if (this.state.at === "") return;
    const at = Number(this.state.at) + by;
    if (at >= 0 && (this.total === null || at < this.total)) this.go({ ...this.state, at: String(at), image: "?", ref: "" });
  }

  toggle(name) {
    if (name === "masks" && !this.about.masks) return this.showProblem("Neither the store nor the referents have masks.");
    this.go({ ...this.state, [name]: this.state[name] === "1" ? "0" : "1" }, null, true);
  }

  zoom(factor) {
    for (const side of this.sides) side.viewer.zoomBy(factor);
  }

  fit() {
    for (const side of this.sides) side.viewer.reset();
  }

  savePng() {
    const [first] = this.sides;
    const width = this.sides.reduce((sum, side) => sum + side.viewer.canvas.width, 0);
    const combined = element("canvas");
    combined.width = width;
    combined.height = Math.max(...this.sides.map((side) => side.viewer.canvas.height));
    let x = 0;
    for (const { viewer } of this.sides) {
      combined.getContext("2d").drawImage(viewer.canvas, x, 0);
      x += viewer.canvas.width;
    }
    combined.toBlob((blob) => download(blob, `refdet-${this.data.image_id}-${first.viewer.canvas.width}.png`), "image/png");
  }

  // Highlight a region of a side, by its index; null for none.
  hover(index, region) {
    const side = this.sides[index];
    if (side.hovered === region) return;
    side.hovered = region;
    this.draw(side);
    for (const entry of side.list.children) entry.classList.toggle("hovered", Number(entry.dataset.index) === region);
  }

  // Show another state of the same image.
  update(state) {
    this.state = state;
    for (const [name, button] of Object.entries(this.toggles)) button.setAttribute("aria-pressed", String(state[name] === "1"));
    this.showReferents();
    for (const side of this.sides) {
      this.draw(side);
      this.listRegions(side);
    }
  }

  // The regions within the limits of the sliders, highest score first.
  shownRegions(side) {
    const indexed = side.store.regions.map((region, index) => ({
      ...region, index, label: `${categoryName(this.about.names.stores[side.index], region.category)} ${formatNumber(region.score)}`.trim(),
    }));
    indexed.sort((a, b) => b.score - a.score || a.index - b.index);
    const maxRegions = this.state.top === "" ? indexed.length : Number(this.state.top);
    return indexed.slice(0, maxRegions).filter((region) => reachesMinimum(region.score, this.state));
  }

  selectedReferent() {
    return this.data.referents.find((referent) => String(referent.key) === this.state.ref) ?? null;
  }

  draw(side) {
    const selected = this.selectedReferent(), { masks, boxes, labels } = this.state;
    side.viewer.show({
      regions: this.shownRegions(side), marks: selected ? this.marksOfReferent(side, selected) : this.marksOfImage(side),
      hovered: side.hovered, faint: Boolean(selected), masks: masks === "1", boxes: boxes === "1", labels: labels === "1",
    });
  }

  // The annotations, or without these the referents.
  marksOfImage(side) {
    const { annotations, referents } = this.data, names = this.about.names.annotations;
    if (!annotations.length) return referents.flatMap((referent) => this.referentMarks(side, referent));
    return annotations.map(({ box, category }) => ({ box, kind: "annotation", label: categoryName(names, category) }));
  }

  // The best region, the model's answers and the boxes of a referent.
  marksOfReferent(side, referent) {
    const marks = [], best = side.store.regions[referent.best[side.index]]; // undefined without a best region
    if (best) marks.push({ box: best.box, kind: "best", label: `best region, IoU ${formatNumber(referent.iou[side.index])}`, mask: best.mask });
    // answers are drawn once, in the first store, whose rows they may refer to
    for (const sentence of side.index === 0 ? referent.sentences : []) {
      const [kind, label] = sentence.wrong ? ["answer", "incorrect prediction"] : ["correct", "correct prediction"];
      for (const [i, box] of sentence.answer.entries()) {
        const mask = sentence.answer_masks[i];
        const isDuplicate = marks.some((mark) => mark.kind === kind && String(mark.box) === String(box) && mark.mask === mask);
        if (!isDuplicate) marks.push({ box, kind, label, mask });
      }
    }
    return [...marks, ...this.referentMarks(side, referent)];
  }

  // The mask of a referent covers all its objects, so only the first box gets the mask, and only on a side whose store has the
  // same image size.
  referentMarks(side, referent) {
    const [height, width] = side.store.size ?? [], isSameSize = height === this.data.height && width === this.data.width;
    return referent.boxes.map((box, i) => ({ box, kind: "referent", label: referent.label, mask: isSameSize && !i ? referent.mask : "" }));
  }

  listRegions(side) {
    const { store } = side, shown = this.shownRegions(side);
    const n = store.regions.length - shown.length;
    const hidden = n ? `, ${n} hidden by the sliders` : "";
    const noMasks = store.masks ? "" : ", no masks in this store";
    side.title.textContent = store.absent || `${store.path}: ${formatCount(shown.length, "region")}${hidden}${noMasks}`;
    side.list.replaceChildren(...shown.map((region) => element("li", {
      "data-index": region.index,
      onpointerenter: () => this.hover(side.index, region.index),
      onpointerleave: () => this.hover(side.index, null),
    }, `${region.label}, row ${region.row}`)));
  }

  showReferents() {
    const { data, about, state, go } = this;
    const entries = data.referents.map((referent) => {
      const selected = String(referent.key) === state.ref;
      const next = { ...state, ref: selected ? "" : String(referent.key) };
      const unknown = about.index.stage ? "not computed yet" : "unknown";
      const ious = about.stores.map((store, i) => {
        const iou = referent.iou[i] === null ? unknown : formatNumber(referent.iou[i], 3);
        return about.stores.length > 1 ? `${store.name}: ${iou}` : iou;
      });
      return element("article", { class: selected ? "selected" : "" },
        element("a", { href: addressOf(next), onclick: (event) => go(next, event, true), "aria-current": selected ? "true" : null },
          `${referent.label} ${categoryName(about.names.referents, referent.category)} ${referent.size ?? ""} ${referent.split}`),
        element("p", { class: isUncovered(referent) ? "bad" : "" },
          referent.boxes.length ? `IoU of the best region: ${ious.join(", ")}` : "no target"),
        referent.iou[0] === 0 ? element("p", { class: "bad" }, `No region of ${about.stores[0].name} overlaps it.`) : "",
        referent.mask_error ? element("p", { class: "bad" }, `Its mask cannot be shown: ${referent.mask_error}`) : "",
        ...referent.sentences.map((sentence) => element("p", {}, element("q", {}, sentence.text), answerElement(sentence, about))));
    });
    this.referents.replaceChildren(
      element("h3", {}, formatCount(data.referents.length, "referent")),
      entries.length ? element("p", { class: "facts" }, this.selectedReferent() ? "Click it again to show all regions equally." : "Click one to see its best region and the predictions.") : "",
      ...entries,
      entries.length ? "" : element("p", {}, about.refs ? "No sentence refers to this image." : "No refs were given."));
  }
}

function answerElement(sentence, about) {
  if (!about.predictions || sentence.wrong === null) return "";
  const text = sentence.wrong ? (sentence.answer.length ? "incorrect" : "no prediction") : "correct";
  const iou = sentence.iou === null ? "" : `, IoU ${formatNumber(sentence.iou)}`;
  return element("small", { class: sentence.wrong ? "bad" : "good" }, ` ${text}${iou}`);
}
