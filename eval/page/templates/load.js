// Load by layer and expert.

// Multiples of the balanced load on a scale of doublings; beyond a quarter and four times the colour stays.
const DOUBLINGS = { zmin: -2, zmax: 2, colorscale: DIVERGING };
const doublings = (value) => Math.max(-2, Math.min(2, Math.log2(Math.max(value, 1e-6))));
const loadBar = (title) => colourBar(title, { tickvals: [-2, -1, 0, 1, 2], ticktext: ["≤ ¼", "½", "1", "2", "≥ 4"] });

const expertsOf = (run, indices) => {
  const most = Math.max(...indices.map((i) => sitesOf(run)[i].experts));
  return [...Array(most).keys()].map((e) => expertLabel(run, e));
};

// One row a router, as wide as the widest, with null where it has no such expert.
const ragged = (rows, width) => rows.map((row) => [...row, ...Array(width - row.length).fill(null)]);

function loadCells(run, view, indices) {
  const routing = run.doc.routing;
  const [what, domain] = [view.slice(0, view.indexOf(":")), view.slice(view.indexOf(":") + 1)];
  const name = (i, e) => `${plain(siteLabel(run, i))}, expert ${plain(expertLabel(run, e))}`;
  if (what === "lift") {
    const [value, low, high] = ["value", "low", "high"].map((key) => unpack(run, routing.lift[domain][key]));
    return {
      z: indices.map((i) => value[i].map(doublings)),
      times: indices.map((i) => value[i]),
      text: indices.map((i) => value[i].map((v, e) => `${name(i, e)}<br>lift for ${plain(domain)}: ${fixed(v, 2)} ` +
        `[${fixed(low[i][e], 2)}, ${fixed(high[i][e], 2)}]<br>1: the domain makes no difference`)),
    };
  }
  const share = unpack(run, what === "all" ? routing.load_of_all : routing.load[domain]);
  const times = indices.map((i) => share[i].map((v) => v * share[i].length));
  return {
    z: times.map((row) => row.map(doublings)),
    times,
    text: indices.map((i, r) => share[i].map((v, e) => `${name(i, e)}<br>${percent(v, 2)} of the tokens of ` +
      `${what === "all" ? "all domains" : plain(domain)}<br>${fixed(times[r][e], 2)} × the balanced ${percent(1 / share[i].length, 2)}`)),
  };
}

function loadSection(run) {
  const views = [["all:", "load, all domains"], ...domainsOf(run).map((d) => [`domain:${d}`, `load, ${d}`]),
    ...Object.keys(run.doc.routing.lift || {}).map((d) => [`lift:${d}`, `lift, ${d}`])];
  let again = () => {};
  const view = control(run, "load-view", views, () => again());
  const kind = kindControl(run, "load-kind", () => again());
  again = chart(part(run, "load-map"), () => {
    const indices = sitesOfKind(run, kind.value);
    const columns = expertsOf(run, indices);
    const cells = loadCells(run, view.value, indices);
    const lift = view.value.startsWith("lift:");
    const top = cells.times.map((row) => Math.max(...row));
    const busiest = top.indexOf(Math.max(...top));
    const where = `${siteLabel(run, indices[busiest])}, expert ${expertLabel(run, cells.times[busiest].indexOf(top[busiest]))}`;
    return {
      ...heatmap(rowNames(run, indices), columns, { z: ragged(cells.z, columns.length), text: ragged(cells.text, columns.length) }, {
        scale: DOUBLINGS, bar: loadBar(lift ? "lift; 1 = no difference" : "load, as a multiple of 1/E; 1 = balanced"),
        titles: ["expert", "layer"],
      }),
      label: `Heatmap of ${view.selectedOptions[0].text}, ${indices.length} routers by ${columns.length} experts. ` +
        `Highest: ${fixed(top[busiest], 2)} at ${where}.`,
    };
  });
}
