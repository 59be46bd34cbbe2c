// The grid: a page of thumbnails with boxes, and their sentences.

import { BEST, REFERENT } from "./colors.js";
import { count, element, number, svgElement } from "./dom.js";
import { address, filters, PAGE, ROOT } from "./state.js";

const BOLD = 12; // top-scoring regions of a thumbnail, drawn with an outline

export function render(main, page, state, about, go) {
  const offset = page.offset;
  const last = Math.max(0, Math.ceil(page.total / PAGE) - 1);
  const noun = state.show === "refs" ? "referent" : "image";
  const to = (n) => ({ ...state, page: n ? String(n) : "" });
  const link = (text, n, there) =>
    there
      ? element("a", { class: "button", href: address(to(n)), onclick: (event) => go(to(n), event) }, text)
      : element("span", { class: "button off", "aria-disabled": "true" }, text);
  const at = Math.floor(offset / PAGE);
  const pages = element("nav", { "aria-label": "Pages", class: "pages" },
    element("strong", { id: "total" }, count(page.total, noun)),
    link("Previous page", at - 1, at > 0),
    element("span", {}, `page ${at + 1} of ${last + 1}`),
    link("Next page", at + 1, at < last),
    state.show === "refs"
      ? element("span", { class: "legend" }, element("i", { class: "referent" }), "referent", element("i", { class: "best" }), "best region")
      : element("span", { class: "legend" }, element("i", { class: "best" }), "regions"),
    element("a", { class: "button", href: `${ROOT}api/list.json?${filters(state)}`, download: "refdet-list.json" }, "Download list (JSON)"),
  );
  const cards = page.items.map((item, i) => card(item, offset + i, state, about, go));
  main.replaceChildren(
    element("h2", { class: "unseen" }, "Grid"),
    pages,
    cards.length ? element("ul", { class: "grid" }, ...cards) : element("p", { class: "nothing" }, empty(state, about)),
  );
}

function empty(state, about) {
  if (!about.stores[0].images) return "This store has no images.";
  if (state.show === "refs" && !about.refs) return "No refs: start refdet browse with --refer-root, --dataset and --split-by, or choose Show: images.";
  if (state.only === "wrong" && !about.predictions) return "No predictions: start refdet browse with --predictions.";
  if (about.index.stage) return "Nothing found yet; the regions are still being read. The list updates by itself.";
  return "Nothing matches. Change the filters or the search.";
}

function card(item, at, state, about, go) {
  const object = item.object;
  const there = { ...state, image: String(item.image_id), ref: object ? String(object.key) : "", at: String(at) };
  const texts = object
    ? [element("span", { class: "facts" },
        element("b", { class: object.iou[0] !== null && object.iou[0] < 0.5 ? "bad" : "" }, iouText(object, about)),
        ` ${categoryName(about.names.referents, object.category)} ${object.size ?? ""} ${object.split}`),
      ...sentences(object)]
    : [element("span", { class: "facts" }, count(item.regions, "region"), undrawn(item)), element("span", {}, item.name)];
  if (item.error) texts.push(element("span", { class: "bad" }, `failed: ${item.error}`));
  return element("li", {},
    element("a", { class: "card", href: address(there), onclick: (event) => go(there, event) }, picture(item, state, about), ...texts));
}

function undrawn(item) {
  const hidden = item.regions - item.boxes.length;
  return hidden ? `, ${hidden.toLocaleString("en")} not drawn` : "";
}

function iouText(object, about) {
  if (!object.boxes.length) return "no target";
  const unknown = about.index.stage ? "…" : "unknown";
  const known = object.iou.slice(0, about.stores.length).map((iou) => (iou === null ? unknown : number(iou)));
  return `IoU ${known.join(" / ")}`;
}

function sentences(object) {
  if (!object.sentences.length) return [element("span", {}, object.label)];
  const shown = object.sentences.slice(0, 3).map((one) =>
    element("q", { class: one.wrong ? "wrong" : "" }, one.text, one.wrong ? element("small", {}, one.answer.length ? " (incorrect)" : " (no prediction)") : null));
  const more = object.sentences.length - shown.length;
  return more > 0 ? [...shown, element("small", {}, `and ${more} more`)] : shown;
}

// `names` has names by the texts of ids; regions without a category have the id -1.
export function categoryName(names, category) {
  if (category === null) return "";
  return names.get(category) ?? (category === "-1" ? "" : `category ${category}`);
}

function picture(item, state, about) {
  const frame = element("span", { class: "frame" });
  if (!item.missing) {
    const image = element("img", { src: `${ROOT}thumbnail/${item.position}`, alt: "", decoding: "async" });
    image.addEventListener("error", () => {
      image.remove();
      frame.append(element("span", { class: "gone" }, "no image"));
    });
    frame.append(image);
  } else frame.append(element("span", { class: "gone" }, about.images ? "no image" : "no images given"));
  const { width, height } = item;
  const drawing = svgElement("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  const add = (boxes, color, widths) => {
    const d = boxes.map(([x1, y1, x2, y2]) => `M${x1} ${y1}H${x2}V${y2}H${x1}Z`).join("");
    for (const [stroke, width] of widths) {
      drawing.append(svgElement("path", { d, fill: "none", stroke: stroke ?? color, "stroke-width": width, "vector-effect": "non-scaling-stroke" }));
    }
  };
  const outlined = [["#000", 4], [null, 2]];
  if (item.object) {
    if (item.best_box) add([item.best_box], BEST, outlined);
    add(item.object.boxes, REFERENT, outlined);
  } else {
    add(item.boxes.slice(BOLD), BEST, [[null, 0.7]]);
    add(item.boxes.slice(0, BOLD), BEST, outlined);
  }
  frame.append(drawing);
  return frame;
}
