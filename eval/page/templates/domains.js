// Specialisation: information about the domain by layer, and how far the domains' loads are apart.

function specialisationSection(run) {
  const found = run.doc.routing.specialisation;
  chart(part(run, "nmi"), () => {
    const kinds = kindsOf(run);
    const lines = kinds.map((kind, n) => {
      const indices = sitesOfKind(run, kind);
      return line(kinds.length > 1 ? kindLabel(run, kind) : "observed", layersOf(run, indices),
        indices.map((i) => found.nmi_per_site[i]), n, 4);
    });
    const x = [...new Set(lines.flatMap((l) => l.x))];
    const layout = linesLayout(x, "NMI", { rangemode: "tozero" });
    const rows = Math.ceil((kinds.length + 1) / 3);
    return {
      data: [...lines, reference("chance, mean over routers", x, x.map(() => found.chance))],
      layout: { ...layout, height: 300 + 18 * rows, margin: { ...layout.margin, t: 66 + 18 * rows } },
      label: `Information about the domain by layer. ${says("It is", found.nmi_per_site, 4)} By chance ${fixed(found.chance, 4)}.`,
    };
  });
  divergenceChart(run);
}

function divergenceChart(run) {
  const domains = domainsOf(run);
  const tables = run.doc.routing.divergence;
  if (!tables) return;
  let again = () => {};
  const site = control(run, "divergence-site",
    [["mean", "mean over all routers"], ...sitesOf(run).map((_, i) => [i, siteLabel(run, i)])], () => again());
  again = chart(part(run, "divergence"), () => {
    const chosen = site.value === "mean" ? sitesOf(run).map((_, i) => i) : [Number(site.value)];
    const all = chosen.map((i) => unpack(run, tables[i]));
    const value = domains.map((_, a) => domains.map((__, b) => mean(all.map((t) => t[a][b]))));
    const picture = heatmap(domains, domains, {
      z: value.map((row, a) => row.map((v, b) => (a === b ? null : v))),
      text: value.map((row, a) => row.map((v, b) => `${plain(domains[a])} and ${plain(domains[b])}: ${fixed(v, 3)}`)),
    }, {
      scale: { zmin: 0, zmax: Math.max(0.1, ...value.flat()), colorscale: SEQUENTIAL },
      bar: colourBar("divergence; 0 = alike"),
      written: value.map((row) => row.map((v) => fixed(v, 2))),
    });
    picture.layout.height = 150 + 44 * domains.length;
    const highest = Math.max(...value.flat());
    return { ...picture, label: `Divergence of each two of ${domains.length} domains, at most ${fixed(highest, 3)}.` };
  });
}
