// Start: read the data, set up what is on the page, and mark the place in the contents.

const SETUPS = {
  load: loadSection, balance: balanceSection, specialisation: specialisationSection, coactivation: coactivationSection,
  transitions: transitionsSection, similarity: similaritySection, ablation: ablationSection, text: textSection,
  vocabulary: vocabularySection, training: trainingSection, provenance: provenanceSection,
};

function provenanceSection(run) {
  part(run, "download").addEventListener("click", () => {
    const url = URL.createObjectURL(new Blob([JSON.stringify(expand(run))], { type: "application/json" }));
    const name = String(run.doc.name ?? "run").replace(/[^\w.-]+/g, "_");
    element("a", { href: url, download: `${name}-report.json` }).click();
    URL.revokeObjectURL(url);
  });
  const raw = part(run, "raw");
  const folded = (key, value) => (isPacked(value) ? `table of ${value.rows} rows` : key === "tokens" || key === "samples" ||
    key === "words" ? "folded" : value);
  raw.addEventListener("toggle", () => { raw.querySelector("pre").textContent = JSON.stringify(run.doc, folded, 1); }, { once: true });
}

// Each run is set up when it is first shown.
const ready = new Set();
function show(n) {
  hideTip();
  for (const run of runs) document.getElementById(run.id).hidden = run.n !== n;
  if (ready.has(n)) return;
  ready.add(n);
  for (const section of document.querySelectorAll(`#r${n} section[data-section]`)) SETUPS[section.dataset.section]?.(runs[n]);
  contents(document.getElementById(`r${n}`));
}

function contents(box) {
  const links = new Map([...box.querySelectorAll(".contents a")].map((a) => [a.getAttribute("href").slice(1), a]));
  const seen = new Set();
  const watch = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) isIntersecting ? seen.add(target.id) : seen.delete(target.id);
    const first = [...links.keys()].find((id) => seen.has(id));
    for (const [id, a] of links) {
      if (id === first) a.setAttribute("aria-current", "location");
      else a.removeAttribute("aria-current");
    }
    const strip = box.querySelector(".contents");
    const current = first && links.get(first);
    if (current && strip.scrollWidth > strip.clientWidth) strip.scrollLeft = current.offsetLeft - 40;
  }, { rootMargin: "-15% 0px -60% 0px" });
  for (const id of links.keys()) if (document.getElementById(id)) watch.observe(document.getElementById(id));
}

function failed(error) {
  const box = document.getElementById("failure");
  box.hidden = false;
  box.textContent = typeof DecompressionStream === "undefined"
    ? "This page needs a newer browser: Firefox 113, Chrome 80, Safari 16.4 or later."
    : `The page could not be set up: ${error}`;
}

async function start() {
  await readRuns();
  const chosen = document.getElementById("chosen-run");
  if (chosen) {
    compareSection();
    chosen.addEventListener("change", () => show(Number(chosen.value)));
  }
  show(chosen ? Number(chosen.value) : 0);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redrawAll);
  window.addEventListener("beforeprint", drawAll);
}

start().catch((error) => { failed(error); throw error; });
