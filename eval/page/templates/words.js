// Vocabulary: the tokens that choose an expert most reliably.

function vocabularySection(run) {
  const tables = run.doc.routing.vocabulary.filter((v) => v.ids > 0);
  const show = () => {
    const one = tables[Number(site.value)];
    const load = unpack(run, run.doc.routing.load_of_all)[one.site];
    part(run, "vocabulary-share").textContent = `Of ${one.ids.toLocaleString("en")} token ids seen often enough, on average ` +
      `${percent(one.share, 0)} of the occurrences go to the id's own top expert; balanced random choice would give about ` +
      `${percent(1 / sitesOf(run)[one.site].experts, 0)}, and more for rare ids.`;
    part(run, "words").replaceChildren(...one.words.flatMap((words, e) => (words.length ? [wordTable(run, e, words, load[e])] : [])));
  };
  const site = control(run, "vocabulary-site", tables.map((v, n) => [n, siteLabel(run, v.site)]), show);
  show();
}

function wordTable(run, expert, words, load) {
  const caption = element("caption", {}, element("bdi", {}, `Expert ${expertLabel(run, expert)}`), `, ${percent(load, 0)} of all tokens`);
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "token"),
    element("th", { scope: "col", class: "number" }, "share"), element("th", { scope: "col", class: "number" }, "seen")));
  const rows = words.map(([id, share, seen]) => element("tr", {},
    element("td", {}, element("code", {}, visibleWord(tokenText(run, id)))),
    element("td", { class: "number" }, percent(share, 0)), element("td", { class: "number" }, seen.toLocaleString("en"))));
  return element("div", { class: "scroll" }, element("table", {}, caption, head, element("tbody", {}, ...rows)));
}

const visibleWord = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍").replaceAll(" ", "·") || "∅";
