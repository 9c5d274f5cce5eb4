// Several runs side by side.

function compareSection() {
  const routed = runs.filter((r) => r.doc.routing);
  if (document.getElementById("compare-scores")) chart(document.getElementById("compare-scores"), compareScores);
  if (!document.getElementById("compare-entropy")) return;
  for (const [id, key, title, range] of [["compare-entropy", "entropy_of_load", "entropy / log E", { range: [0, 1.05] }],
    ["compare-violation", "max_violation", "MaxVio", { rangemode: "tozero" }]]) {
    chart(document.getElementById(id), () => {
      const data = routed.map((run, n) => line(run.doc.name, ...meanByLayer(run, key), n));
      const layout = linesLayout([...new Set(data.flatMap((d) => d.x))].sort((a, b) => a - b), title, range);
      return {
        data,
        layout: { ...layout, height: 300 + 20 * routed.length, margin: { ...layout.margin, t: 44 + 20 * routed.length } },
        label: `${title} by layer. ${data.map((d) => `${d.name}: ${says("", d.y)}`).join(" ")}`,
      };
    });
  }
  compareLoad(routed);
}

// Layers, and the mean over the routers of each.
function meanByLayer(run, key) {
  const layers = [...new Set(sitesOf(run).map((s) => s.layer))].sort((a, b) => a - b);
  return [layers, layers.map((l) => mean(sitesOf(run).flatMap((s, i) => (s.layer === l ? [run.doc.routing[key][i]] : []))))];
}

function compareScores() {
  const scored = runs.filter((r) => r.doc.scores && r.doc.scores.perplexity);
  const domains = [...new Set(scored.flatMap((r) => Object.keys(r.doc.scores.perplexity)))];
  return {
    ...dots(domains, scored.map((r) => ({ name: r.doc.name, found: domains.map((d) => r.doc.scores.perplexity[d]?.loss) })),
      { title: "loss (nats per token)", zero: false, digits: 4 }),
    label: `Loss by domain. ${domains.map((d) => `${d}: ` + scored.filter((r) => r.doc.scores.perplexity[d])
      .map((r) => `${r.doc.name} ${fixed(r.doc.scores.perplexity[d].loss.value, 3)}`).join(", ")).join("; ")}.`,
  };
}

function compareLoad(routed) {
  const choose = (id, at) => {
    const select = fill(document.getElementById(id), routed.map((r) => [r.n, r.doc.name]));
    select.value = String(routed[at].n);
    return select;
  };
  const [first, second, kind] = [choose("compare-first", 0), choose("compare-second", 1), document.getElementById("compare-kind")];
  const [div, apart] = [document.getElementById("compare-load"), document.getElementById("compare-apart")];
  const both = () => [runs[Number(first.value)], runs[Number(second.value)]];
  // The routers of the first run that the second has too, with as many experts, as pairs of indices.
  const shared = () => {
    const [a, b] = both();
    const there = new Map(sitesOf(b).map((s, j) => [s.path, j]));
    return sitesOf(a).flatMap((s, i) => {
      const j = there.get(s.path);
      return j !== undefined && sitesOf(b)[j].experts === s.experts ? [[i, j]] : [];
    });
  };
  const again = chart(div, () => difference(both(), shared().filter(([i]) => sitesOf(both()[0])[i].kind === kind.value)));
  const paired = () => {
    const pairs = shared();
    const kinds = [...new Set(pairs.map(([i]) => sitesOf(both()[0])[i].kind))];
    fill(kind, kinds.map((k) => [k, kindLabel(both()[0], k)]));
    apart.hidden = pairs.length > 0;
    apart.textContent = "These two runs have no router in common with the same number of experts, so their loads cannot be subtracted.";
    div.closest("figure").hidden = pairs.length === 0;
    if (pairs.length) again();
  };
  first.addEventListener("change", paired);
  second.addEventListener("change", paired);
  kind.addEventListener("change", again);
  paired();
}

function difference([a, b], pairs) {
  const [of_a, of_b] = [unpack(a, a.doc.routing.load_of_all), unpack(b, b.doc.routing.load_of_all)];
  const indices = pairs.map(([i]) => i);
  const columns = expertsOf(a, indices);
  const rows = pairs.map(([i, j]) => of_a[i].map((v, e) => 100 * (of_b[j][e] - v)));
  const most = Math.max(1, ...rows.flat().map(Math.abs));
  const text = rows.map((row, r) => row.map((v, e) => `${plain(siteLabel(a, indices[r]))}, expert ${e}<br>` +
    `${signed(v, 2)} points: ${percent(of_a[pairs[r][0]][e], 2)}, then ${percent(of_b[pairs[r][1]][e], 2)}`));
  return {
    ...heatmap(rowNames(a, indices), columns, { z: ragged(rows, columns.length), text: ragged(text, columns.length) }, {
      scale: { zmin: -most, zmax: most, colorscale: DIVERGING }, bar: colourBar("percentage points; 0 = no difference"),
      titles: ["expert", "layer"],
    }),
    label: `Difference of load, at most ${fixed(most, 1)} percentage points.`,
  };
}
