// COCO's compressed run-length encoding. Runs go down the columns and alternate between background and mask. A run is encoded
// by its length, from the fourth run on by the difference from the length two runs before. This number is written in groups of
// five bits, lowest first, each as the character "0" plus the group, plus 32 if more groups follow; the highest bit of the last group
// is the sign.

// The lengths of the runs.
export function decodeRuns(text) {
  const lengths = [];
  let at = 0;
  while (at < text.length) {
    let value = 0, shift = 0, code;
    do {
      code = text.charCodeAt(at++) - 48;
      value += (code & 31) * 2 ** shift;
      shift += 5;
    } while (code & 32 && at < text.length);
    if (code & 16) value -= 2 ** shift;
    if (lengths.length > 2) value += lengths[lengths.length - 2];
    lengths.push(value);
  }
  return lengths;
}

// Blend a color [r, g, b] over the pixels of a mask; `pixels` is the RGBA data of an image of this size.
export function paintMask(pixels, text, height, width, [r, g, b], alpha) {
  let at = 0, inside = false;
  for (const run of decodeRuns(text)) {
    const end = Math.min(at + run, height * width);
    if (inside) {
      let x = Math.floor(at / height), y = at % height;
      for (let k = at; k < end; k++) {
        const i = (y * width + x) * 4;
        const below = pixels[i + 3] / 255, above = alpha, both = above + below * (1 - above);
        pixels[i] = (r * above + pixels[i] * below * (1 - above)) / both;
        pixels[i + 1] = (g * above + pixels[i + 1] * below * (1 - above)) / both;
        pixels[i + 2] = (b * above + pixels[i + 2] * below * (1 - above)) / both;
        pixels[i + 3] = both * 255;
        if (++y === height) { y = 0; x++; }
      }
    }
    at = end;
    inside = !inside;
  }
}
