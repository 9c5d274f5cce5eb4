// The page's data: one JSON element a run, and packed numbers beside it that are unpacked when they are looked at.

const runs = [];

async function inflate(id) {
  const packed = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function readRuns() {
  for (const [n, element] of [...document.querySelectorAll("script.document")].entries()) {
    const id = `r${n}`;
    runs.push({ n, id, doc: JSON.parse(element.textContent), bytes: await inflate(`${id}-bulk`), cache: new Map() });
  }
}

const isPacked = (value) => value !== null && typeof value === "object" && "at" in value && "bits" in value;

// Rows of numbers of one packed table.
function unpack(run, table) {
  if (!isPacked(table)) return table;
  if (run.cache.has(table)) return run.cache.get(table);
  const { at, bits, low, step, rows, columns } = table;
  const view = new DataView(run.bytes.buffer, run.bytes.byteOffset);
  const out = [];
  let place = at;
  for (let r = 0; r < rows; r++) {
    const row = [];
    const width = Array.isArray(columns) ? columns[r] : columns;
    for (let c = 0; c < width; c++, place += bits / 8) {
      const code = bits === 8 ? view.getUint8(place) : view.getUint16(place, true);
      row.push(Math.round((low + step * code) * 1e6) / 1e6);
    }
    out.push(row);
  }
  run.cache.set(table, out);
  return out;
}

// The whole document with every table as lists.
function expand(run, value = run.doc) {
  if (isPacked(value)) return unpack(run, value);
  if (Array.isArray(value)) return value.map((v) => expand(run, v));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, expand(run, v)]));
}

const sitesOf = (run) => (run.doc.routing ? run.doc.routing.sites : []);
const domainsOf = (run) => Object.keys(run.doc.routing ? run.doc.routing.domains : {});
const kindsOf = (run) => [...new Set(sitesOf(run).map((s) => s.kind))];

// What to call a kind of router, one router, and an expert.
const kindLabel = (run, kind) => run.doc.labels[kind] ?? kind;
function siteLabel(run, index) {
  const site = sitesOf(run)[index];
  return kindsOf(run).length > 1 ? `layer ${site.layer}, ${kindLabel(run, site.kind)}` : `layer ${site.layer}`;
}
function expertLabel(run, expert) {
  const names = run.doc.expert_names;
  return names && expert < names.length ? String(names[expert]) : String(expert);
}

// Indices of the routers of one kind, and their names on an axis: the layer, or the path where layers repeat.
function sitesOfKind(run, kind) {
  return sitesOf(run).flatMap((s, i) => (s.kind === kind ? [i] : []));
}
function rowNames(run, indices) {
  const layers = indices.map((i) => String(sitesOf(run)[i].layer));
  return new Set(layers).size === layers.length ? layers : indices.map((i) => sitesOf(run)[i].path);
}
