// The state of the page is its address, so that every view can be kept and sent.

export const FILTERS = ["show", "q", "split", "category", "size", "only", "sort", "desc"];
const SHOWN = ["score", "top", "masks", "boxes", "labels"];
const DEFAULTS = { show: "images", sort: "order", score: "0", top: "100", masks: "0", boxes: "1", labels: "1" };

export const PAGE = 60;

export function defaultShow(show) {
  DEFAULTS.show = show;
}

export function read() {
  const given = new URLSearchParams(location.search);
  const state = {};
  for (const name of [...FILTERS, ...SHOWN, "page", "image", "ref", "at"]) {
    state[name] = given.get(name) ?? DEFAULTS[name] ?? "";
  }
  return state;
}

export function address(state) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== "" && value !== (DEFAULTS[name] ?? "")) given.set(name, value);
  }
  const text = given.toString();
  return text ? `/?${text}` : "/";
}

// The parameters of the filters for the server.
export function filters(state) {
  return new URLSearchParams(FILTERS.map((name) => [name, state[name]]));
}

// Take the token out of the address: the cookie has it now, and addresses are sent around.
export function forgetToken() {
  const given = new URL(location.href);
  if (!given.searchParams.has("token")) return;
  given.searchParams.delete("token");
  history.replaceState(null, "", given);
}
