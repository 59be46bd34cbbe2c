// Colors that stay apart on photographs: referents, best regions and answers have fixed ones, categories one each.

export const REFERENT = "#00e676";
export const BEST = "#ffd600";
export const ANSWER = "#ff5252";
export const RIGHT_ANSWER = "#b388ff";
export const ANNOTATION = "#40c4ff";

// [r, g, b] of a color "#rrggbb".
export function rgbOfHex(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

// `category` is the text of an id, whose last digits suffice for a color.
export function rgbOf(category) {
  const hue = (Math.abs(Number(category.slice(-9))) * 137.508) % 360;
  const f = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.6 - 0.4 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [f(0), f(8), f(4)];
}

export function colorOf(category) {
  return `rgb(${rgbOf(category).join(",")})`;
}
