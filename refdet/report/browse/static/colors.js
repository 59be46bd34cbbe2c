// Colors that can be told apart on photographs: fixed ones for referents, best regions and answers, and one per category.

export const REFERENT = "#00e676";
export const BEST = "#ffd600";
export const ANSWER = "#ff5252";
export const CORRECT_ANSWER = "#b388ff";
export const ANNOTATION = "#40c4ff";

// [r, g, b] of a color "#rrggbb".
export function rgbOfHex(text) {
  return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
}

// [r, g, b] of a category id, given as text; its last nine digits determine the hue.
export function rgbOfCategory(category) {
  const hue = (Math.abs(Number(category.slice(-9))) * 137.508) % 360; // multiples of the golden angle: successive ids differ clearly
  const channel = (n) => { // of the HSL color (hue, 100 %, 60 %)
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.6 - 0.4 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

export function colorOfCategory(category) {
  return `rgb(${rgbOfCategory(category).join(",")})`;
}
