// The state of the page is in its address, so that every view can be bookmarked and shared.

export const FILTERS = ["show", "q", "split", "category", "size", "only", "sort", "desc"];
const DISPLAY_OPTIONS = ["score", "top", "masks", "boxes", "labels"];
// An empty score or top shows all regions.
const DEFAULTS = { show: "images", sort: "order", masks: "0", boxes: "1", labels: "1" };

export const PAGE_SIZE = 60;

// The folder that the paths of this server begin with, such as "/Ab3/".
export const ROOT = new URL("..", import.meta.url).pathname;

// Set what an address without "show" shows: "refs" or "images".
export function setDefaultShow(show) {
  DEFAULTS.show = show;
}

// The state in the address, with defaults for what is missing. `page` is the page of the grid, from 0; `image` the id of the
// image shown large, "" for the grid; `at` the index of this image in the list, "" if unknown; `ref` the key of the selected
// referent.
export function readState() {
  const params = new URLSearchParams(location.search);
  const state = {};
  for (const name of [...FILTERS, ...DISPLAY_OPTIONS, "page", "image", "ref", "at"]) {
    state[name] = params.get(name) ?? DEFAULTS[name] ?? "";
  }
  for (const name of ["page", "at", "top"]) if (!/^[0-9]{1,9}$/.test(state[name])) state[name] = "";
  return state;
}

// The address of a state, without values that are the default.
export function addressOf(state) {
  const params = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== "" && value !== (DEFAULTS[name] ?? "")) params.set(name, value);
  }
  const text = params.toString();
  return text ? `${ROOT}?${text}` : ROOT;
}

// The filters as parameters of a request.
export function filterParams(state) {
  return new URLSearchParams(FILTERS.map((name) => [name, state[name]]));
}

// Whether a score reaches the minimum; both are rounded to float32, as scores in the store are.
export function reachesMinimum(score, state) {
  return state.score === "" || Math.fround(score) >= Math.fround(Number(state.score));
}

// Remove the token from the address, as addresses are shared and the cookie has the token now. The cookie is sent for the
// folder only, so the address moves into the folder.
export function removeToken() {
  const url = new URL(location.href);
  url.searchParams.delete("token");
  url.pathname = ROOT;
  if (url.href !== location.href) history.replaceState(null, "", url);
}
