// Helpers for elements and requests. Text from files becomes text nodes and attributes, never markup.

// Create an element. Attributes "on..." are event listeners; true sets an empty attribute, false, null or undefined none.
export function element(tag, attributes = {}, ...children) {
  const created = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) created.addEventListener(name.slice(2), value);
    else if (value === true) created.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) created.setAttribute(name, value);
  }
  created.append(...children.filter((child) => child !== null && child !== undefined));
  return created;
}

const SVG = "http://www.w3.org/2000/svg";

export function svgElement(tag, attributes, ...children) {
  const created = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) created.setAttribute(name, value);
  created.append(...children);
  return created;
}

// Fetch JSON; throws an Error with the server's message if the server refuses the request.
export async function getJson(address, signal) {
  let response;
  try {
    response = await fetch(address, { signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("No response: refdet browse has stopped, or the connection is lost. Start it again and open the address it prints.");
  }
  if (response.ok) return response.json();
  const text = await response.text();
  try {
    throw new Error(JSON.parse(text).error);
  } catch (error) {
    if (error instanceof SyntaxError) throw new Error(text.trim() || `HTTP ${response.status}`);
    throw error;
  }
}

// A number, such as an IoU, with a fixed number of decimals; a dash if it is null or undefined.
export function formatNumber(value, digits = 2) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

// "1 image", "2,000 images".
export function formatCount(n, noun) {
  return `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
}

// Save a Blob as a file of this name.
export function download(blob, name) {
  const address = URL.createObjectURL(blob);
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000); // not at once, as the download starts after this function returns
}
