// Small helpers for elements, texts and controls. Text from the data only ever becomes text nodes and attributes.

function element(tag, attributes = {}, ...children) {
  const out = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "style") out.style.cssText = value;
    else if (value !== null && value !== undefined) out.setAttribute(name, value);
  }
  out.append(...children);
  return out;
}

const part = (run, name) => document.getElementById(`${run.id}-${name}`);

const fixed = (value, digits) => (value === null || value === undefined ? "none" : value.toFixed(digits));
const percent = (value, digits = 1) => (value === null || value === undefined ? "none" : `${(100 * value).toFixed(digits)} %`);

// A narrow window cuts a long entry of a select; its tooltip has the whole text.
const entitle = ({ target }) => { if (target.matches("select")) target.title = target.selectedOptions[0]?.text ?? ""; };
for (const event of ["pointerover", "focusin", "change"]) document.addEventListener(event, entitle);

// Options as [value, text] pairs; a control with a single choice is not shown. Returns the <select>.
function fill(select, options) {
  select.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
  select.closest(".control").hidden = options.length < 2;
  return select;
}

function control(run, name, options, changed) {
  const select = fill(part(run, name), options);
  select.addEventListener("change", changed);
  return select;
}

function kindControl(run, name, changed) {
  return control(run, name, kindsOf(run).map((kind) => [kind, kindLabel(run, kind)]), changed);
}

// Spaces and line ends of a token made visible, without being loud.
const VISIBLE = { "\n": "↵\n", "\r": "␍", "\t": "⇥\t" };
function tokenNodes(text) {
  if (text === "") return [element("span", { class: "blank" }, "∅")];
  const blank = /^ +$/.test(text) ? text.replaceAll(" ", "·") : null;
  if (blank) return [element("span", { class: "blank" }, blank)];
  return text.split(/([\n\r\t])/).filter((piece) => piece !== "").map((piece) =>
    piece in VISIBLE ? element("span", { class: "blank" }, VISIBLE[piece]) : piece);
}

// A token in a sentence: quotes, and names for what cannot be seen.
const tokenName = (text) => `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(" ", "·")}”`;
const tokenText = (run, id) => (run.doc.tokens && String(id) in run.doc.tokens ? run.doc.tokens[id] : `#${id}`);
