// The grid: a page of thumbnails with their boxes and sentences.

import { BEST, REFERENT } from "./colors.js";
import { element, formatCount, formatNumber, svgElement } from "./dom.js";
import { addressOf, filterParams, PAGE_SIZE, ROOT } from "./state.js";

const MIN_IOU = 0.5; // of a region that covers a referent, as in queries.py
const MAX_BOLD = 12; // top-scoring regions of a thumbnail that are drawn in bold

// Show a page of a list in the element `main`. `page` is the response to api/items, `about` that to api/about; `go` shows
// another state.
export function render(main, page, state, about, go) {
  const offset = page.offset;
  const last = Math.max(0, Math.ceil(page.total / PAGE_SIZE) - 1);
  const noun = state.show === "refs" ? "referent" : "image";
  const stateOfPage = (n) => ({ ...state, page: n ? String(n) : "" });
  const link = (text, n, enabled) =>
    enabled
      ? element("a", { class: "button", href: addressOf(stateOfPage(n)), onclick: (event) => go(stateOfPage(n), event) }, text)
      : element("span", { class: "button off", "aria-disabled": "true" }, text);
  const current = Math.floor(offset / PAGE_SIZE);
  const pages = element("nav", { "aria-label": "Pages", class: "pages" },
    element("strong", { id: "total" }, formatCount(page.total, noun)),
    link("Previous page", current - 1, current > 0),
    element("span", {}, `page ${current + 1} of ${last + 1}`),
    link("Next page", current + 1, current < last),
    state.show === "refs"
      ? element("span", { class: "legend" }, element("i", { class: "referent" }), "referent", element("i", { class: "best" }), "best region")
      : element("span", { class: "legend" }, element("i", { class: "best" }), "regions"),
    element("a", { class: "button", href: `${ROOT}api/list.json?${filterParams(state)}`, download: "refdet-list.json" }, "Download list (JSON)"),
  );
  const cards = page.items.map((item, i) => card(item, offset + i, state, about, go));
  main.replaceChildren(
    element("h2", { class: "visually-hidden" }, "Grid"),
    pages,
    cards.length ? element("ul", { class: "grid" }, ...cards) : element("p", { class: "nothing" }, emptyMessage(state, about)),
  );
}

function emptyMessage(state, about) {
  if (!about.stores[0].images) return "This store has no images.";
  if (state.show === "refs" && !about.refs) return "No refs: start refdet browse with --refer-root, --dataset and --split-by, or choose Show: images.";
  if (state.only === "wrong" && !about.predictions) return "No predictions: start refdet browse with --predictions.";
  if (about.index.stage) return "Nothing found yet; the regions are still being read. The list updates by itself.";
  return "Nothing matches. Change the filters or the search.";
}

// The thumbnail, facts and sentences of one item, which link to its image; `at` is the index of the item in the list.
function card(item, at, state, about, go) {
  const referent = item.referent;
  const imageState = { ...state, image: String(item.image_id), ref: referent ? String(referent.key) : "", at: String(at) };
  const texts = referent
    ? [element("span", { class: "facts" },
        element("b", { class: isUncovered(referent) ? "bad" : "" }, iouText(referent, about)),
        ` ${categoryName(about.names.referents, referent.category)} ${referent.size ?? ""} ${referent.split}`),
      ...sentenceElements(referent)]
    : [element("span", { class: "facts" }, formatCount(item.regions, "region"), notDrawn(item)), element("span", {}, item.name)];
  if (item.error) texts.push(element("span", { class: "bad" }, `failed: ${item.error}`));
  return element("li", {},
    element("a", { class: "card", href: addressOf(imageState), onclick: (event) => go(imageState, event) }, picture(item, about), ...texts));
}

// Whether no region of the first store covers a referent; false while that is unknown.
export function isUncovered(referent) {
  return referent.iou[0] !== null && referent.iou[0] < MIN_IOU;
}

function notDrawn(item) {
  const n = item.regions - item.boxes.length;
  return n ? `, ${n.toLocaleString("en")} not drawn` : "";
}

function iouText(referent, about) {
  if (!referent.boxes.length) return "no target";
  const unknown = about.index.stage ? "…" : "unknown";
  const ious = referent.iou.slice(0, about.stores.length).map((iou) => (iou === null ? unknown : formatNumber(iou)));
  return `IoU ${ious.join(" / ")}`;
}

function sentenceElements(referent) {
  if (!referent.sentences.length) return [element("span", {}, referent.label)];
  const shown = referent.sentences.slice(0, 3).map((sentence) =>
    element("q", { class: sentence.wrong ? "wrong" : "" }, sentence.text, sentence.wrong ? element("small", {}, sentence.answer.length ? " (incorrect)" : " (no prediction)") : null));
  const more = referent.sentences.length - shown.length;
  return more > 0 ? [...shown, element("small", {}, `and ${more} more`)] : shown;
}

// The name of a category. `names` maps ids, as strings, to names; regions without a category have the id -1.
export function categoryName(names, category) {
  if (category === null) return "";
  return names.get(category) ?? (category === "-1" ? "" : `category ${category}`);
}

// A thumbnail with boxes over it: those of the referent and its best region, or of the regions of the image.
function picture(item, about) {
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
  const outlined = [["#000", 4], [null, 2]]; // a black line below a thinner one in the color of the box
  if (item.referent) {
    if (item.best_box) add([item.best_box], BEST, outlined);
    add(item.referent.boxes, REFERENT, outlined);
  } else {
    add(item.boxes.slice(MAX_BOLD), BEST, [[null, 0.7]]);
    add(item.boxes.slice(0, MAX_BOLD), BEST, outlined);
  }
  frame.append(drawing);
  return frame;
}
