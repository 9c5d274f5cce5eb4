// Sampled documents with the experts of every token.

const STREAMS = { attention_mask: "read by the encoder", decoder_attention_mask: "read by the decoder" };

// [expert, weight] of the slots of a token at one router, the heaviest first; empty slots are left out.
function slots(run, sample, site, t) {
  const row = sample.sites.findIndex(([index]) => index === site);
  if (row < 0) return [];
  const K = sample.sites[row][1];
  const experts = unpack(run, sample.experts)[row].slice(t * K, t * K + K);
  const weights = unpack(run, sample.weights)[row].slice(t * K, t * K + K);
  return experts.map((e, k) => [Math.round(e), weights[k]]).filter(([e]) => e >= 0);
}

function tokensRecorded(run, sample, site) {
  const row = sample.sites.findIndex(([index]) => index === site);
  return row < 0 ? 0 : unpack(run, sample.experts)[row].length / sample.sites[row][1];
}

function textSection(run) {
  const samples = run.doc.routing.samples.filter((s) => Object.keys(s.tokens).length);
  const show = () => showDocuments(run, samples.filter((s) => s.domain === domain.value), Number(layer.value));
  const layersFor = () => fill(layer, sitesOfKind(run, kind.value).map((i) => [i, layerName(run, i)]));
  const domain = control(run, "text-domain", [...new Set(samples.map((s) => s.domain))].map((d) => [d, d]), show);
  const layer = part(run, "text-layer");
  layer.addEventListener("change", show);
  const seen = kindsOf(run).filter((k) => sitesOfKind(run, k).some((i) => samples.some((s) => textOf(s, sitesOf(run)[i]))));
  const kind = control(run, "text-kind", seen.map((k) => [k, kindLabel(run, k)]), () => { layersFor(); show(); });
  layersFor();
  show();
  tooltips(run, () => ({ samples: samples.filter((s) => s.domain === domain.value), site: Number(layer.value), kind: kind.value }));
}

const layerName = (run, i) => rowNames(run, sitesOfKind(run, sitesOf(run)[i].kind))[sitesOfKind(run, sitesOf(run)[i].kind).indexOf(i)];

// The token ids that a router reads, or undefined: routers of an encoder read another text than those of the decoder.
const textOf = (sample, site) => sample.tokens[site.stream];

function showDocuments(run, samples, site) {
  const used = new Set();
  const one = sitesOf(run)[site];
  const several = Object.keys(samples[0].tokens).length > 1;
  const documents = samples.flatMap((sample, n) => {
    const ids = textOf(sample, one);
    if (!ids) return [];
    const box = element("div", { class: "tokens", dir: "auto", role: "group", "aria-label": `Document ${n + 1}` });
    const count = Math.min(ids.length, tokensRecorded(run, sample, site));
    ids.slice(0, count).forEach((id, t) => {
      const top = slots(run, sample, site, t)[0];
      const span = element("span", { class: "token", tabindex: t ? -1 : 0, "data-n": n, "data-t": t });
      const text = tokenText(run, id);
      const ending = /\n+$/.test(text) ? [element("br")] : []; // outside, so that the expert's number stays on the line
      span.append(...tokenNodes(ending.length ? text.replace(/\n+$/, (ends) => "↵".repeat(ends.length)) : text));
      if (top) {
        used.add(top[0]);
        span.dataset.e = top[0];
        span.style.cssText = expertStyle(top[0]);
      }
      box.append(span, ...ending);
    });
    const stream = several ? `, ${STREAMS[one.stream] ?? one.stream}` : "";
    return [element("div", { class: "sample" }, element("h4", {}, `Document ${n + 1}${stream}, ${count} tokens`), box)];
  });
  part(run, "documents").replaceChildren(...documents);
  part(run, "legend").replaceChildren(...[...used].sort((a, b) => a - b).map((e) => {
    const name = expertLabel(run, e);
    return element("span", { role: "listitem", style: expertStyle(e) }, name === String(e) ? `expert ${e}` : `${e} ${name}`);
  }));
}

const tip = document.getElementById("tip");

function tooltips(run, state) {
  const box = part(run, "documents");
  const tokenAt = (event) => event.target instanceof Element && event.target.closest(".token");
  const open = (event) => { const token = tokenAt(event); if (token) showTip(run, token, state()); };
  box.addEventListener("mouseover", open);
  box.addEventListener("focusin", open);
  box.addEventListener("mouseout", hideTip);
  box.addEventListener("focusout", hideTip);
  box.addEventListener("click", (event) => tokenAt(event) && step(tokenAt(event)));
  box.addEventListener("keydown", (event) => {
    const token = tokenAt(event);
    if (event.key === "Escape") hideTip();
    if (!token) return;
    const all = [...token.parentElement.querySelectorAll(".token")];
    const to = { ArrowRight: all.indexOf(token) + 1, ArrowLeft: all.indexOf(token) - 1, Home: 0, End: all.length - 1 }[event.key];
    if (to === undefined || !all[to]) return;
    event.preventDefault();
    step(all[to]);
  });
}

// One token of a document is in the order of the Tab key, the others are reached with the arrow keys.
function step(token) {
  for (const other of token.parentElement.querySelectorAll(".token")) other.tabIndex = -1;
  token.tabIndex = 0;
  token.focus();
}

function hideTip() {
  tip.hidden = true;
  document.querySelectorAll("[aria-describedby='tip']").forEach((e) => e.removeAttribute("aria-describedby"));
}

function showTip(run, token, { samples, site, kind }) {
  hideTip();
  const [sample, t] = [samples[Number(token.dataset.n)], Number(token.dataset.t)];
  const id = textOf(sample, sitesOf(run)[site])[t];
  const here = slots(run, sample, site, t);
  const rows = here.map(([e, w]) => element("tr", {}, element("td", {}, `expert ${expertLabel(run, e)}`),
    element("td", { class: "number" }, fixed(w, 2)),
    element("td", {}, element("span", { class: "bar", style: `width:${Math.round(60 * Math.min(1, Math.abs(w)))}px` }))));
  const strip = sitesOfKind(run, kind).map((i) => {
    const found = slots(run, sample, i, t);
    const name = `${layerName(run, i)}: ${found.map(([e, w]) => `expert ${expertLabel(run, e)} ${fixed(w, 2)}`).join(", ") || "none"}`;
    const cell = element("span", { "aria-label": name, ...(i === site ? { class: "here" } : {}) }, found.length ? String(found[0][0]) : "–");
    if (found.length) cell.style.cssText = expertStyle(found[0][0]);
    return cell;
  });
  tip.replaceChildren(
    element("p", {}, element("strong", {}, tokenName(tokenText(run, id))), ` id ${id}, position ${t}`),
    element("p", {}, here.length ? `${siteLabel(run, site)}:` : "No expert was chosen here."),
    element("table", {}, element("tbody", {}, ...rows)),
    element("p", {}, "Strongest expert by layer, this one framed:"),
    element("div", { class: "strip" }, ...strip),
  );
  token.setAttribute("aria-describedby", "tip");
  tip.hidden = false;
  place(token.getClientRects()[0] ?? token.getBoundingClientRect());
}

// Below the token, or above it where there is more room; always within the window.
function place(at) {
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = Math.max(8, Math.min(at.left, document.documentElement.clientWidth - width - 8));
  const below = at.bottom + 6 + height <= window.innerHeight || at.top < height + 6;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${(below ? at.bottom + 6 : at.top - height - 6) + window.scrollY}px`;
}
