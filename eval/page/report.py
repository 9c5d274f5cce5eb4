"""The report: evaluation documents as one HTML page that needs nothing but itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from molora.errors import ConfigError
from molora.eval.page.pack import compressed, embedded_json, pack
from molora.eval.page.tables import (
    definitions,
    expert_label,
    key_figures,
    other_data,
    sections,
    site_labels,
    specialists,
)
from molora.eval.verdict import verdict
from molora.extras import need

__all__ = ["render", "write_report"]

TEMPLATES = Path(__file__).parent / "templates"
# In this order in the page: each file uses only what the ones before it define.
SCRIPTS = ("data", "dom", "colours", "chart", "load", "balance", "domains", "pairs", "experts", "scores", "tokens",
           "words", "compare", "main")  # fmt: skip
LEVELS = {
    "good": ("✓", "Good"),
    "warn": ("!", "Look closer"),
    "bad": ("✕", "Problem"),
    "unknown": ("?", "Not measured"),
}


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The page of one evaluation document, or of several with their comparison on top.

    The page holds its data, its style, its scripts and plotly, and loads nothing; it is below 8 MB, if need be by
    leaving out samples and tables, which it says. The same documents give the same bytes.

    Raises:
        ConfigError: when there is no document, or plotly or jinja2 is not installed.
    """
    if not documents:
        raise ConfigError("report: got no evaluation, expected at least one evaluation.json")
    environment, plotly = _packages()
    runs = [_run(n, document, len(documents)) for n, document in enumerate(documents)]
    page: str = environment.get_template("page.html.j2").render(
        runs=runs,
        comparison=_comparison(documents) if len(documents) > 1 else None,
        levels=LEVELS,
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        scripts=[(TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS],
        plotly=compressed(plotly.encode()),
        plotly_licence=plotly[: plotly.index("*/") + 2],
    )
    return page.encode("utf-8", "replace").decode()  # half a character of a token would not go into a file


def write_report(documents: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Write :func:`render`'s page; a reader finds the old page or the new one, never a part of it.

    Raises:
        ConfigError: as :func:`render`, or when the file cannot be written.
    """
    page, path = render(documents), Path(path)
    staged = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_text(page, encoding="utf-8")
        os.replace(staged, path)
    except OSError as e:
        raise ConfigError(f"report: {path} could not be written ({e}); check the path and the free space") from e


def _packages() -> tuple[Any, str]:
    """The environment of the templates, where every value is escaped, and plotly's source."""
    jinja2, offline = (need(module, "eval", "a report") for module in ("jinja2", "plotly.offline"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment, offline.get_plotlyjs()


def _run(n: int, document: Mapping[str, Any], pages: int) -> dict[str, Any]:
    """What the template says about one document."""
    packed, bulk = pack(document, pages)
    routing, provenance = document.get("routing") or {}, document.get("provenance") or {}
    labels = site_labels([s["kind"] for s in routing.get("sites", ())])
    return {
        "n": n,
        "id": f"r{n}",
        "name": str(document.get("name") or f"run {n}"),
        "verdict": verdict(document),
        "sections": sections(document),
        "document": document,
        "facts": _facts(document),
        "specialists": specialists(document),
        "provenance": definitions(provenance),
        "expert_label": lambda e: expert_label(document, e),
        "shown": packed["shown"],
        "json": embedded_json({**packed, "labels": labels}),
        "bulk": bulk,
    }


def _facts(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The line below the title: recipe, base, what was evaluated."""
    provenance, routing = document.get("provenance") or {}, document.get("routing") or {}
    base, data = provenance.get("base") or {}, provenance.get("data") or {}
    experts = sorted({s["experts"] for s in routing.get("sites", ())})
    facts = [
        ("Recipe", provenance.get("recipe")),
        ("Base model", str(base.get("name") or "").rstrip("/").rpartition("/")[2]),
        ("Its class", base.get("class")),
        ("Domains", ", ".join(data) or ", ".join(routing.get("domains", ()))),
        ("Documents", f"{sum(d.get('documents', 0) for d in data.values()):,}" if data else None),
        ("Tokens", f"{sum(d.get('tokens', 0) for d in data.values()):,}" if data else None),
        ("Routers", f"{len(routing['sites']):,}" if routing else None),
        ("Experts a router", "–".join(map(str, [experts[0], experts[-1]][: len(experts)])) if experts else None),
    ]
    return [(label, str(value)) for label, value in facts if value]


def _comparison(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    routed = [n for n, d in enumerate(documents) if d.get("routing")]
    scored = [n for n, d in enumerate(documents) if (d.get("scores") or {}).get("perplexity")]
    return {
        "figures": key_figures(documents),
        "other_data": other_data(documents),
        "routed": len(routed) > 1,
        "scored": len(scored) > 1,
    }
