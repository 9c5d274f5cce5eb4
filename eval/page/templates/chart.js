// Charts are drawn when they come into view, and again when a control or the colour scheme changes.

const charts = new Map(); // element: { build, drawn }
let plotlyReady = null;

// Plotly's source is in the page, compressed; it becomes a script when the first chart is looked at.
function plotly() {
  plotlyReady ??= inflate("plotly").then((bytes) => {
    document.head.append(element("script", {}, new TextDecoder().decode(bytes)));
    document.getElementById("plotly").remove();
    return window.Plotly;
  });
  return plotlyReady;
}

// Plotly reads a little HTML in texts: names from the data must not be read so. Long ones are cut.
const SAFE = { "<": "&lt;", ">": "&gt;", "&": "&amp;" };
const plain = (text, most = 44) => {
  const letters = [...String(text)];
  const short = letters.length > most ? `${letters.slice(0, most - 1).join("")}…` : letters.join("");
  return short.replace(/[<>&]/g, (c) => SAFE[c]);
};

const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) draw(target);
}, { rootMargin: "400px" });

// `build` gives { data, layout, label }: label is what a screen reader says in place of the picture.
function chart(div, build) {
  charts.set(div, { build, drawn: false });
  watcher.observe(div);
  return () => redraw(div);
}

function redraw(div) {
  if (charts.get(div).drawn) draw(div);
}

async function draw(div) {
  const one = charts.get(div);
  one.drawn = true;
  watcher.unobserve(div);
  const Plotly = await plotly();
  const { data, layout, label } = one.build();
  div.setAttribute("aria-label", label);
  div.style.minHeight = `${layout.height}px`;
  await Plotly.react(div, data, { ...frame(), ...layout, ...axes(layout) }, options(Plotly, div));
}

const drawAll = () => Promise.all([...charts.keys()].filter((div) => div.offsetParent !== null).map(draw));
const redrawAll = () => [...charts.keys()].forEach(redraw);

function frame() {
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: css("--ink") },
    margin: { l: 48, r: 16, t: 36, b: 44 },
    hoverlabel: { align: "left", namelength: -1 },
    dragmode: false,
    showlegend: false,
    modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--quiet"), activecolor: css("--ink") },
  };
}

// Axes with the page's colours, and names that push the plot aside instead of running out of the picture.
function axes(layout) {
  const base = { gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--quiet"), automargin: true };
  const of = (name) => ({ ...base, ...layout[name], title: { ...(layout[name] || {}).title } });
  return { xaxis: of("xaxis"), yaxis: of("yaxis") };
}

function options(Plotly, div) {
  const file = { filename: `routing-${div.dataset.chart}` };
  const save = (format) => ({
    name: `Download as ${format.toUpperCase()}`,
    icon: format === "svg" ? Plotly.Icons.disk : Plotly.Icons.camera,
    click: (gd) => Plotly.downloadImage(gd, { ...file, format, scale: 2, width: gd.offsetWidth, height: gd.offsetHeight }),
  });
  return {
    responsive: true,
    displaylogo: false,
    displayModeBar: "hover",
    toImageButtonOptions: { ...file, format: "svg" },
    modeBarButtons: [[save("svg"), save("png")], ["zoom2d", "resetScale2d"]],
  };
}

// A colour bar above the plot: beside it, it would take the width that small screens do not have.
function colourBar(title, ticks = {}) {
  return {
    orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", ypad: 8, xpad: 0, len: 0.85, thickness: 10,
    title: { text: title, side: "top" }, outlinewidth: 0, ...ticks,
  };
}

// A heatmap with a row for each name and cells no higher than they are useful. `cells`: { z, text }.
function heatmap(rows, columns, cells, { scale, bar, titles = ["", ""], written = false }) {
  const height = Math.max(12, Math.min(28, 700 / rows.length)) * rows.length + 130;
  const few = columns.length <= 24;
  return {
    data: [{
      type: "heatmap", z: cells.z, hovertext: cells.text, y: rows.map((r) => plain(r, 28)), x: columns.map((_, i) => i),
      hovertemplate: "%{hovertext}<extra></extra>", hoverongaps: false, xgap: few ? 1 : 0, ygap: rows.length <= 40 ? 1 : 0,
      colorbar: bar, ...scale, ...(written ? { text: written, texttemplate: "%{text}" } : {}),
    }],
    layout: {
      height, margin: { l: 48, r: 16, t: 76, b: 48 }, plot_bgcolor: css("--missing"),
      xaxis: {
        title: { text: titles[0], standoff: 26 }, showgrid: false, zeroline: false, range: [-0.5, columns.length - 0.5],
        ...(few ? { tickvals: columns.map((_, i) => i), ticktext: columns.map((c) => plain(c, 18)) }
          : { tick0: 0, dtick: columns.length > 64 ? 16 : 8 }),
      },
      yaxis: { title: { text: titles[1] }, type: "category", autorange: "reversed", showgrid: false },
    },
  };
}
