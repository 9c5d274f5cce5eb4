// Ablations and training curves.

const signed = (value, digits = 3) => `${value >= 0 ? "+" : "−"}${Math.abs(value).toFixed(digits)}`;

// One dot with an interval for each row and series, the series side by side within the row.
function dots(rows, series, { title, zero, digits = 3 }) {
  const data = series.map((s, n) => {
    const shift = (n - (series.length - 1) / 2) * Math.min(0.16, 0.7 / series.length);
    const there = rows.flatMap((_, r) => (s.found[r] ? [r] : []));
    const value = there.map((r) => s.found[r].value);
    return {
      type: "scatter", mode: "markers", name: plain(s.name), x: value, y: there.map((r) => r + shift),
      marker: { symbol: SYMBOLS[n % SYMBOLS.length], size: 9, color: lineColour(n), line: { width: 1, color: css("--page") } },
      error_x: {
        type: "data", symmetric: false, thickness: 1.5, width: 4, color: lineColour(n),
        array: there.map((r) => s.found[r].high - s.found[r].value),
        arrayminus: there.map((r) => s.found[r].value - s.found[r].low),
      },
      customdata: there.map((r) => `${plain(rows[r])}, ${plain(s.name)}<br>${s.found[r].value.toFixed(digits)} ` +
        `[${s.found[r].low.toFixed(digits)}, ${s.found[r].high.toFixed(digits)}]`),
      hovertemplate: "%{customdata}<extra></extra>",
    };
  });
  const lines = Math.ceil(series.length / 3);
  return {
    data,
    layout: {
      height: 130 + 18 * lines + rows.length * Math.max(34, 15 * series.length), showlegend: true,
      margin: { l: 48, r: 16, t: 40 + 20 * lines, b: 48 },
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 11 } },
      xaxis: { title: { text: title }, zeroline: zero, zerolinewidth: 2, nticks: 7 },
      yaxis: { tickvals: rows.map((_, r) => r), ticktext: rows.map((r) => plain(r, 22)), range: [rows.length - 0.5, -0.5],
        showgrid: false, zeroline: false },
    },
  };
}

function ablationSection(run) {
  const { interventions, loss } = run.doc.ablation;
  const domains = Object.keys(loss || interventions[0].delta);
  const gates = interventions.filter((i) => i.kind === "gates");
  if (part(run, "gates")) {
    chart(part(run, "gates"), () => ({
      ...dots(gates.map((g) => g.name), domains.map((d) => ({ name: d, found: gates.map((g) => g.delta[d]) })),
        { title: "change of loss (nats per token)", zero: true }),
      label: `Change of the loss with other gates. ${gates.map((g) => `${g.name}: ` +
        domains.filter((d) => g.delta[d]).map((d) => `${d} ${signed(g.delta[d].value)}`).join(", ")).join("; ")}.`,
    }));
  }
  for (const [kind, name] of [["expert", "experts"], ["favourites", "favourites"]]) {
    const rows = interventions.filter((i) => i.kind === kind);
    if (part(run, name)) chart(part(run, name), () => damage(rows, domains));
  }
}

// Interventions by domains; the colour is the change of the loss, the mark the domain that is hurt most.
function damage(rows, domains) {
  const value = rows.map((r) => domains.map((d) => (r.delta[d] ? r.delta[d].value : null)));
  const most = Math.max(1e-6, ...value.flat().map((v) => Math.abs(v ?? 0)));
  const picture = heatmap(rows.map((r) => r.name), domains, {
    z: value,
    text: rows.map((r) => domains.map((d) => {
      const found = r.delta[d];
      return found ? `${plain(r.name)}, ${plain(d)}<br>${signed(found.value)} [${signed(found.low)}, ${signed(found.high)}]` +
        `${r.worst === d ? "<br>◆ hurt most" : ""}` : "";
    })),
  }, {
    scale: { zmin: -most, zmax: most, colorscale: DIVERGING },
    bar: colourBar("change of the loss", { nticks: 5 }),
    written: rows.map((r) => domains.map((d) => (r.delta[d] ? `${r.worst === d ? "◆ " : ""}${signed(r.delta[d].value)}` : ""))),
    titles: ["domain", ""],
  });
  picture.layout.height = 130 + rows.length * 28;
  const worst = rows.filter((r) => r.worst !== null && r.worst !== undefined).map((r) => `${r.name} hurts ${r.worst}`);
  return { ...picture, label: `Change of the loss by domain. ${worst.join("; ") || "No domain is hurt for certain"}.` };
}

const FIRST = ["loss", "eval_loss", "aux_loss", "eval_aux_loss"];
const NO_CURVES = ["step", "epoch", "total_flos"];

function trainingSection(run) {
  const log = run.doc.training;
  const keys = [...new Set(log.flatMap((entry) => Object.keys(entry)))].filter((key) => !NO_CURVES.includes(key) &&
    log.filter((entry) => typeof entry[key] === "number").length > 1);
  keys.sort((a, b) => (FIRST.indexOf(a) + 1 || 99) - (FIRST.indexOf(b) + 1 || 99) || (a < b ? -1 : 1));
  const box = part(run, "curves");
  if (keys.length === 0) box.append(element("p", {}, "Nothing was logged more than once, so there is no curve."));
  for (const key of keys) {
    const div = element("div", { class: "chart", "data-chart": `training-${key}`, role: "img" });
    box.append(element("figure", {}, element("figcaption", {}, key), div));
    chart(div, () => {
      const there = log.filter((entry) => typeof entry[key] === "number" && typeof entry.step === "number");
      const [x, y] = [there.map((entry) => entry.step), there.map((entry) => entry[key])];
      const balanced = key.endsWith("aux_loss") ? [reference("balanced", [x[0], x.at(-1)], [1, 1])] : [];
      return {
        data: [{ ...line(key, x, y, 0, 4), hovertemplate: `step %{x}<br>${plain(key)} %{y:.4~g}<extra></extra>`,
          ...(x.length > 60 ? { mode: "lines" } : {}) }, ...balanced],
        layout: { height: 250, xaxis: { title: { text: "step" }, showgrid: false, zeroline: false },
          yaxis: { nticks: 6 } },
        label: `${key} by step: ${y[0].toPrecision(4)} at step ${x[0]}, ${y.at(-1).toPrecision(4)} at step ${x.at(-1)}.`,
      };
    });
  }
}
