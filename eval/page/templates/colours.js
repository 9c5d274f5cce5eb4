// Colours that stay apart with every common colour blindness; text on them has a contrast of at least 4.5.

const OKABE_ITO = ["#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999"];
const RINGS = ["none", "solid", "dotted", "dashed", "double"]; // experts beyond the eighth: the same colour, underlined
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "x", "cross", "star", "pentagon"];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
// ColorBrewer's PuOr, from purple over white to orange.
const DIVERGING = ["#2d004b", "#542788", "#8073ac", "#b2abd2", "#d8daeb", "#f7f7f7", "#fee0b6", "#fdb863", "#e08214",
  "#b35806", "#7f3b08"].map((colour, i) => [i / 10, colour]);
const SEQUENTIAL = "Viridis";

const colourOf = (n) => OKABE_ITO[n % OKABE_ITO.length];
const ringOf = (n) => RINGS[Math.floor(n / OKABE_ITO.length) % RINGS.length];

function luminance(hex) {
  const [r, g, b] = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16) / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// Black or white, whichever is read better.
const inkOn = (hex) => ((luminance(hex) + 0.05) / 0.05 >= 1.05 / (luminance(hex) + 0.05) ? "#000000" : "#ffffff");

const expertStyle = (e) => `background:${colourOf(e)};color:${inkOn(colourOf(e))};--ring:${ringOf(e)}`;

// Lines of Okabe-Ito's yellow vanish on white: lines have the other seven, and black or white.
const lineColour = (n) => ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999"][n % 7];

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
