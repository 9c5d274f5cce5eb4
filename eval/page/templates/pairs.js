// Experts used together, and paths from layer to layer.

const SHARES = { zmin: 0, colorscale: SEQUENTIAL };

// Names of the experts on an axis, or their numbers.
const numbered = (run, count) => [...Array(count).keys()].map((e) => expertLabel(run, e));

// Square cells would waste the width of small tables and the height of large ones.
const squareHeight = (count) => 130 + Math.max(160, Math.min(560, 30 * count));

function coactivationSection(run) {
  const { coactivation, load_of_all } = run.doc.routing;
  let again = () => {};
  const there = coactivation.flatMap((table, i) => (table ? [[i, siteLabel(run, i)]] : []));
  const site = control(run, "coactivation-site", there, () => again());
  again = chart(part(run, "coactivation-map"), () => {
    const i = Number(site.value);
    const [share, load] = [unpack(run, coactivation[i]), unpack(run, load_of_all)[i]];
    const names = numbered(run, share.length);
    const expected = load.map((l) => Math.min(1, l * sitesOf(run)[i].choices));
    const z = share.map((row, a) => row.map((v, b) => (a === b ? null : v)));
    const highest = Math.max(0.05, ...z.flat());
    const picture = heatmap(names, names, {
      z,
      text: share.map((row, a) => row.map((v, b) => `of the tokens of expert ${plain(names[a])}<br>${percent(v, 0)} chose ` +
        `expert ${plain(names[b])} as well<br>expected if independent: about ${percent(expected[b], 0)}`)),
    }, {
      scale: { ...SHARES, zmax: highest }, titles: ["also chose expert", "tokens of expert"],
      bar: colourBar("share of the row's tokens", { tickformat: ".0%" }),
    });
    picture.layout.height = squareHeight(share.length);
    return { ...picture, label: `Heatmap of ${share.length} experts used together, ${site.selectedOptions[0].text}; at most ${percent(highest, 0)}.` };
  });
}

function transitionsSection(run) {
  const pairs = run.doc.routing.transitions;
  let again = () => {};
  const pair = control(run, "transition-pair",
    pairs.map((p, n) => [n, `${siteLabel(run, p.from)} → ${sitesOf(run)[p.to].layer}`]), () => again());
  again = chart(part(run, "transition-map"), () => {
    const { from, to, share: packed } = pairs[Number(pair.value)];
    const share = unpack(run, packed);
    const [rows, columns] = [numbered(run, sitesOf(run)[from].experts), numbered(run, sitesOf(run)[to].experts)];
    const highest = Math.max(0.05, ...share.flat());
    const [first, second] = [sitesOf(run)[from].layer, sitesOf(run)[to].layer];
    const picture = heatmap(rows, columns, {
      z: share,
      text: share.map((row, a) => row.map((v, b) => `${percent(v, 0)} of the tokens of expert ${plain(rows[a])} in layer ${first}` +
        `<br>go on to expert ${plain(columns[b])} in layer ${second}<br>balanced: ${percent(1 / columns.length, 0)}`)),
    }, {
      scale: { ...SHARES, zmax: highest }, titles: [`strongest expert in layer ${second}`, `in layer ${first}`],
      bar: colourBar("share of the row's tokens", { tickformat: ".0%" }),
    });
    picture.layout.height = squareHeight(rows.length);
    return { ...picture, label: `Heatmap of paths, ${pair.selectedOptions[0].text}; at most ${percent(highest, 0)}.` };
  });
}
