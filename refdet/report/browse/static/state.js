// The state of the page is its address, so that every view can be kept and sent.

export const FILTERS = ["show", "q", "split", "category", "size", "only", "sort", "desc"];
const SHOWN = ["score", "top", "masks", "boxes", "labels"];
// without a score or a number of regions all are shown
const DEFAULTS = { show: "images", sort: "order", masks: "0", boxes: "1", labels: "1" };

export const PAGE = 60;

// The folder of all addresses of this server, "/" and "/" around it.
export const ROOT = new URL("..", import.meta.url).pathname;

export function defaultShow(show) {
  DEFAULTS.show = show;
}

export function read() {
  const given = new URLSearchParams(location.search);
  const state = {};
  for (const name of [...FILTERS, ...SHOWN, "page", "image", "ref", "at"]) {
    state[name] = given.get(name) ?? DEFAULTS[name] ?? "";
  }
  for (const name of ["page", "at", "top"]) if (!/^[0-9]{1,9}$/.test(state[name])) state[name] = "";
  return state;
}

export function address(state) {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value !== "" && value !== (DEFAULTS[name] ?? "")) given.set(name, value);
  }
  const text = given.toString();
  return text ? `${ROOT}?${text}` : ROOT;
}

// The parameters of the filters for the server.
export function filters(state) {
  return new URLSearchParams(FILTERS.map((name) => [name, state[name]]));
}

// Whether a score reaches the lowest one, rounded as scores are.
export function reaches(score, state) {
  return state.score === "" || Math.fround(score) >= Math.fround(Number(state.score));
}

// Take the token out of the address, which the cookie has now, as addresses are sent around; and take on the folder
// that the cookie is for.
export function forgetToken() {
  const given = new URL(location.href);
  given.searchParams.delete("token");
  given.pathname = ROOT;
  if (given.href !== location.href) history.replaceState(null, "", given);
}
