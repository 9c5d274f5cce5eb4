// Are experts alike? Cosines and norms of their changes, from the weights alone.

function similaritySection(run) {
  const paths = Object.keys(run.doc.experts);
  const all = [];
  const site = control(run, "similarity-site", paths.map((p) => [p, p]), () => all.forEach((again) => again()));
  all.push(chart(part(run, "cosine"), () => {
    const cosine = unpack(run, run.doc.experts[site.value].cosine);
    const names = numbered(run, cosine.length);
    const others = cosine.flatMap((row, a) => row.filter((_, b) => a !== b));
    const picture = heatmap(names, names, {
      z: cosine.map((row, a) => row.map((v, b) => (a === b ? null : v))),
      text: cosine.map((row, a) => row.map((v, b) => `experts ${plain(names[a])} and ${plain(names[b])}<br>cosine ${fixed(v, 2)}`)),
    }, {
      scale: { zmin: -1, zmax: 1, colorscale: DIVERGING }, titles: ["expert", "expert"],
      bar: colourBar("cosine; 0 = nothing in common"),
    });
    picture.layout.height = squareHeight(names.length);
    return { ...picture, label: `Cosines of ${names.length} experts at ${site.value}. ${says("They are", others)}` };
  }));
  all.push(chart(part(run, "norm"), () => {
    const { norm, intruders } = run.doc.experts[site.value];
    const names = norm.map((_, e) => plain(expertLabel(run, e), 18));
    const few = names.length <= 24;
    return {
      data: [{
        type: "bar", x: names.map((_, e) => e), y: norm, marker: { color: lineColour(0) }, textposition: "outside", cliponaxis: false,
        text: intruders && few ? intruders.map((n) => `${n} intruders`.replace(/^1 intruders$/, "1 intruder")) : undefined,
        customdata: norm.map((v, e) => `expert ${names[e]}<br>norm ${v.toPrecision(3)}${intruders ? `<br>intruder dimensions: ${intruders[e]}` : ""}`),
        hovertemplate: "%{customdata}<extra></extra>",
      }],
      layout: {
        height: squareHeight(norm.length), yaxis: { title: { text: "norm" }, range: [0, 1.15 * Math.max(1e-9, ...norm)] },
        xaxis: { title: { text: "expert" }, showgrid: false, zeroline: false,
          ...(few ? { tickvals: names.map((_, e) => e), ticktext: names } : { dtick: 8, tick0: 0 }) },
      },
      label: `Norms of the experts' changes at ${site.value}. ${says("They are", norm)}`,
    };
  }));
}
