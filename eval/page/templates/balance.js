// Entropy, MaxVio and effective experts by layer.

// A line through the layers; null is a gap. `n` picks colour, symbol and dash, so that no line is told by colour alone.
function line(name, x, y, n, digits = 3) {
  return {
    type: "scatter", mode: x.length > 60 ? "lines" : "lines+markers", name: plain(name), x, y, connectgaps: false,
    line: { color: lineColour(n), width: 2, dash: DASHES[n % DASHES.length] },
    marker: { symbol: SYMBOLS[n % SYMBOLS.length], size: 7 },
    hovertemplate: `${plain(name)}<br>%{x}: %{y:.${digits}f}<extra></extra>`,
  };
}

const reference = (name, x, y) => ({
  type: "scatter", mode: "lines", name: plain(name), x, y, line: { color: css("--quiet"), width: 1.5, dash: "dot" },
  hovertemplate: `${plain(name)}: %{y:.3~f}<extra></extra>`,
});

// Lines over layers with the legend above the plot.
function linesLayout(x, title, range) {
  return {
    height: 320, showlegend: true, margin: { l: 48, r: 16, t: 84, b: 44 },
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
    xaxis: { title: { text: "layer" }, ...(x.every((v) => typeof v === "number") ? { tickformat: "d" } : { type: "category" }),
      ...(x.length <= 12 ? { tickvals: x } : {}), showgrid: false, zeroline: false },
    yaxis: { title: { text: title }, zeroline: true, ...range },
  };
}

function layersOf(run, indices) {
  const names = rowNames(run, indices);
  return names.every((n) => /^-?\d+$/.test(n)) ? names.map(Number) : names;
}

const mean = (values) => {
  const there = values.filter((v) => v !== null && v !== undefined);
  return there.length ? there.reduce((a, b) => a + b, 0) / there.length : null;
};

const says = (what, values, digits = 2) => {
  const there = values.filter((v) => v !== null && v !== undefined);
  return there.length ? `${what} from ${fixed(Math.min(...there), digits)} to ${fixed(Math.max(...there), digits)}, mean ${fixed(mean(there), digits)}.` : "";
};

function balanceSection(run) {
  const routing = run.doc.routing;
  const all = [];
  const kind = kindControl(run, "balance-kind", () => all.forEach((again) => again()));
  const at = () => {
    const indices = sitesOfKind(run, kind.value);
    return { indices, x: layersOf(run, indices), pick: (key) => indices.map((i) => routing[key][i]) };
  };
  all.push(chart(part(run, "entropy"), () => {
    const { x, pick } = at();
    return {
      data: [line("load", x, pick("entropy_of_load"), 0), line("mean weights", x, pick("entropy_of_mean"), 2),
        line("single tokens", x, pick("mean_entropy"), 1)],
      layout: linesLayout(x, "entropy / log E", { range: [0, 1.05] }),
      label: `Entropy by layer. ${says("Of the load", pick("entropy_of_load"))} ${says("Of single tokens", pick("mean_entropy"))}`,
    };
  }));
  all.push(chart(part(run, "violation"), () => {
    const { x, pick } = at();
    return {
      data: [line("over all", x, pick("max_violation"), 0), line("within a batch", x, pick("max_violation_of_a_batch"), 1)],
      layout: linesLayout(x, "MaxVio", { rangemode: "tozero" }),
      label: `MaxVio by layer. ${says("Over all", pick("max_violation"))} ${says("Within a batch", pick("max_violation_of_a_batch"))}`,
    };
  }));
  all.push(chart(part(run, "effective"), () => {
    const { indices, x, pick } = at();
    return {
      data: [line("effective", x, pick("effective_experts"), 0),
        reference("all experts", x, indices.map((i) => sitesOf(run)[i].experts))],
      layout: linesLayout(x, "experts", { rangemode: "tozero" }),
      label: `Effective experts by layer. ${says("They are", pick("effective_experts"))}`,
    };
  }));
}
