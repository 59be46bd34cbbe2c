// Shows the grid or a single image, as the address says; handles keys, filters and messages.

import { element, formatCount, getJson } from "./dom.js";
import { render } from "./grid.js";
import { Single } from "./single.js";
import { addressOf, filterParams, FILTERS, PAGE_SIZE, readState, removeToken, ROOT, setDefaultShow } from "./state.js";

const KEYS = {
  "/": "search the sentences", "← →": "previous or next image, or page of the grid", Enter: "in the grid: open an image",
  Escape: "back to the grid", m: "masks", b: "boxes", l: "labels", "+ − 0": "zoom in, zoom out, fit", "?": "these keys",
};
const main = document.getElementById("main"), form = document.getElementById("filters"), banner = document.getElementById("banner");
const shownWarnings = new Set();
let about = null, state = null;
let single = null, page = null; // the view: a single image, or a page of the grid
let request = null; // AbortController of the requests for the view that is shown next

// A message that the next view replaces; "" hides it.
function showError(text) {
  banner.textContent = text;
  banner.hidden = !text;
}

// A message that stays until it is dismissed; each text is shown once.
function warn(text) {
  if (shownWarnings.has(text)) return;
  shownWarnings.add(text);
  const message = element("div", { class: "message" }, element("span", {}, text),
    element("button", { type: "button", onclick: () => message.remove() }, "Dismiss"));
  document.getElementById("warnings").append(message);
}

// Show a state. `event` is the click on a link to it, which is left to the browser if it opens another tab.
function go(next, event = null, replace = false) {
  if (event) {
    if (event.ctrlKey || event.metaKey || event.shiftKey || event.button) return;
    event.preventDefault();
  }
  if (next.image === "?") return goToIndex(next);
  history[replace ? "replaceState" : "pushState"](null, "", addressOf(next));
  show();
}

// Show the image at the index `next.at` of the list, after looking up its id.
async function goToIndex(next) {
  try {
    const { items } = await getJson(`${ROOT}api/items?${filterParams(next)}&offset=${next.at}&limit=1&top=0`);
    const [item] = items;
    if (item) go({ ...next, image: String(item.image_id), ref: item.referent ? String(item.referent.key) : "" });
  } catch (error) {
    showError(error.message);
  }
}

// Show the state in the address: change the single image that is already shown, or fetch and show another view.
async function show() {
  const before = state;
  state = readState();
  fillForm();
  if (single && state.image !== "" && state.image === before.image && state.at === before.at) {
    single.update(state);
    return;
  }
  request?.abort();
  request = new AbortController();
  const { signal } = request;
  try {
    if (state.image !== "") {
      const [data, list] = await Promise.all([
        getJson(`${ROOT}api/image/${encodeURIComponent(state.image)}`, signal),
        state.at === "" ? null : getJson(`${ROOT}api/items?${filterParams(state)}&offset=0&limit=0`, signal),
      ]);
      [single, page] = [new Single(main, data, state, about, go, list ? list.total : null), null];
    } else {
      const offset = Number(state.page || 0) * PAGE_SIZE;
      const limits = new URLSearchParams({ offset, limit: PAGE_SIZE, top: state.top, score: state.score });
      const list = await getJson(`${ROOT}api/items?${filterParams(state)}&${limits}`, signal);
      [single, page] = [null, list];
      if (list.total && offset >= list.total) { // beyond the end
        const last = Math.ceil(list.total / PAGE_SIZE) - 1;
        return go({ ...state, page: last ? String(last) : "" }, null, true);
      }
      render(main, list, state, about, go);
    }
    showError("");
    document.title = state.image === "" ? "refdet browse" : `image ${state.image} – refdet browse`;
    main.dataset.ready = String(Number(main.dataset.ready ?? 0) + 1); // number of views shown, for tests
  } catch (error) {
    if (error.name === "AbortError") return;
    [single, page] = [null, null];
    main.replaceChildren(element("p", { class: "nothing" }, "This view cannot be shown. ", element("a", { href: ROOT }, "Back to the grid")));
    showError(error.message);
  }
}

// Show the state in the filters and sliders, except in the field that is being edited.
function fillForm() {
  fillCategories();
  const { score, top } = form.elements;
  for (const field of form.elements) {
    if (field.name && field !== document.activeElement) field.value = state[field.name] ?? "";
  }
  if (state.score === "") score.value = score.min;
  if (state.top === "") top.value = top.max;
  for (const field of [score, top]) field.parentElement.hidden = state.show === "refs" && state.image === "";
  document.getElementById("score-value").textContent = state.score === "" ? "all" : Number(state.score).toFixed(2);
  document.getElementById("top-value").textContent = state.top === "" ? "all" : state.top;
}

// Offer the categories of referents, named as in their file, or those of regions, named as in the store.
function fillCategories() {
  const { category } = form.elements, kind = state.show === "refs" ? "referents" : "regions";
  if (category.dataset.kind === kind) return;
  category.dataset.kind = kind;
  const names = state.show === "refs" ? about.names.referents : about.names.stores[0];
  category.replaceChildren(element("option", { value: "" }, "all"), ...Array.from(names, ([value, text]) => element("option", { value }, text)));
  document.getElementById("category-label").textContent = state.show === "refs" ? "Category of the referent" : "Category of a region";
}

// Set the ranges of the sliders to those of the stores.
function fillSliders() {
  const { score, top } = form.elements, [low, high] = about.index.scores;
  [score.min, score.max] = [Math.floor(low * 100) / 100, Math.ceil(high * 100) / 100];
  top.max = Math.max(1, about.most_regions);
}

// Show the state after a filter or slider was changed.
function applyChange(field) {
  const showsAll = (field.name === "score" && field.value === field.min) || (field.name === "top" && field.value === field.max);
  const next = { ...readState(), [field.name]: showsAll ? "" : field.value };
  if (FILTERS.includes(field.name)) Object.assign(next, { page: "", image: "", ref: "", at: "" });
  go(next, null, field.type === "range" || field.type === "search");
}

let searchTimer = null;
form.addEventListener("input", (event) => {
  clearTimeout(searchTimer);
  if (event.target.type === "search") searchTimer = setTimeout(() => applyChange(event.target), 150);
  else applyChange(event.target);
});
form.addEventListener("submit", (event) => event.preventDefault());
document.getElementById("home").addEventListener("click", (event) => go({}, event));
addEventListener("popstate", show);

const help = document.getElementById("help");
document.getElementById("help-button").addEventListener("click", () => help.showModal());
document.getElementById("keys").append(...Object.entries(KEYS).flatMap(([key, action]) => [element("dt", {}, key), element("dd", {}, action)]));

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open) return;
  const field = event.target.closest("input, select, textarea");
  if (field) {
    if (event.key === "Escape") field.blur();
    return;
  }
  const step = (by) => {
    if (single) return single.step(by);
    const next = Number(state.page || 0) + by;
    if (page && next >= 0 && next * PAGE_SIZE < page.total) go({ ...state, page: next ? String(next) : "" });
  };
  const actions = {
    "/": () => form.elements.q.focus(), "?": () => help.showModal(),
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), Escape: () => single && go(single.backState()),
    m: () => single?.toggle("masks"), b: () => single?.toggle("boxes"), l: () => single?.toggle("labels"),
    "+": () => single?.zoom(1.5), "=": () => single?.zoom(1.5), "-": () => single?.zoom(1 / 1.5), 0: () => single?.fit(),
  };
  const action = actions[event.key];
  if (!action || !state) return;
  event.preventDefault();
  action();
});

const STAGES = { regions: (part) => `reading the regions: ${Math.round(part * 100)} % (sorting and filters are incomplete until then)`, answers: () => "reading the predictions" };

// Show the progress and problems in a response to api/status.
function showStatus(status) {
  const { stage, part, error } = status.index;
  about.index = status.index;
  document.getElementById("progress").textContent = stage ? STAGES[stage](part) : error ? "incomplete: not everything could be read" : "";
  if (error) warn(`Not everything could be read, so overlaps, filters and sorting are incomplete: ${error}`);
  if (status.changed.length) {
    warn(`${status.changed.join(", ")} changed since it was opened: what is shown may be mixed or out of date. Start refdet browse again.`);
  }
  fillSliders();
  if (state) fillForm();
}

// Show newly computed values in the current view.
async function refresh() {
  if (single) {
    const shown = single, data = await getJson(`${ROOT}api/image/${encodeURIComponent(state.image)}`);
    if (single === shown) single.refresh(data); // unless another image was opened meanwhile
  } else if (state.image === "") await show();
}

// Poll the status: every second until the index is complete, then every ten seconds, to notice changed stores.
let disconnected = false;
async function watch() {
  const before = about.index.stage;
  try {
    showStatus(await getJson(`${ROOT}api/status`));
    if (disconnected) showError("");
    disconnected = false;
    if (before && !about.index.stage) await refresh();
  } catch (error) {
    disconnected = true;
    showError(error.message);
  }
  setTimeout(watch, about.index.stage ? 1000 : 10000);
}

async function start() {
  removeToken();
  try {
    about = await getJson(`${ROOT}api/about`);
  } catch (error) {
    main.replaceChildren();
    showError(error.message);
    return;
  }
  const { stores, referents, annotations } = about.names;
  about.names = { stores: stores.map((names) => new Map(names)), referents: new Map(referents), annotations: new Map(annotations) };
  document.getElementById("home").href = ROOT;
  fillSliders();
  setDefaultShow(about.refs ? "refs" : "images");
  const options = (name, pairs) => form.elements[name].append(...pairs.map(([value, text]) => element("option", { value }, text)));
  options("split", about.splits.map((split) => [split, split]));
  form.elements.sort.querySelector("[value=gap]").hidden = about.stores.length < 2;
  form.elements.only.querySelector("[value=wrong]").disabled = !about.predictions;
  for (const option of document.querySelectorAll("[name=only] [value=uncovered], [name=sort] [value=iou]")) option.disabled = !about.refs;
  for (const name of ["q", "split"]) form.elements[name].disabled = !about.sentences;
  document.getElementById("stores").textContent = about.stores
    .map((store) => `${store.name}: ${formatCount(store.images, "image")}, ${formatCount(store.regions, "region")}`)
    .concat(about.refs ? [`${formatCount(about.refs, "referent")}, ${formatCount(about.sentences, "sentence")}`] : []).join(" · ");
  const notes = document.getElementById("notes");
  notes.hidden = !about.notes.length;
  notes.querySelector("summary").textContent = `${formatCount(about.notes.length, "note")}: ${about.notes[0] ?? ""}`;
  notes.querySelector("ul").append(...about.notes.map((note) => element("li", {}, note)));
  await show();
  showStatus(about);
  setTimeout(watch, 500);
}

start();
