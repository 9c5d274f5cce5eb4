"""What a report writes out as tables and words: labels, rows of tables, and which sections exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["SECTIONS", "definitions", "expert_label", "key_figures", "sections", "site_labels", "specialists"]

Document = Mapping[str, Any]
SECTIONS = {
    "load": "Load",
    "balance": "Balance by layer",
    "specialisation": "Specialisation",
    "coactivation": "Experts used together",
    "transitions": "From layer to layer",
    "similarity": "Are experts alike?",
    "ablation": "What experts are for",
    "scores": "Scores",
    "text": "Routing of text",
    "vocabulary": "Vocabulary",
    "training": "Training",
    "provenance": "Provenance",
}
STRONGEST = 8  # rows of the lift table of each domain


def sections(document: Document) -> dict[str, str]:
    """Anchor and title of the sections that the document has data for."""
    routing = document.get("routing") or {}
    there = {
        "load": bool(routing),
        "balance": bool(routing),
        "specialisation": bool(routing.get("specialisation")),
        "coactivation": any(routing.get("coactivation", ())),
        "transitions": bool(routing.get("transitions")),
        "similarity": bool(document.get("experts")),
        "ablation": bool((document.get("ablation") or {}).get("interventions")),
        "scores": any((document.get("scores") or {}).get(k) for k in ("perplexity", "multiple_choice", "exact_match")),
        "text": any(s["tokens"] for s in routing.get("samples", ())),
        "vocabulary": any(v["ids"] for v in routing.get("vocabulary", ())),
        "training": bool(document.get("training")),
        "provenance": True,
    }
    return {key: title for key, title in SECTIONS.items() if there[key]}


def site_labels(kinds: Sequence[str]) -> dict[str, str]:
    """Short names of kinds of sites: as many of the last parts of the path as tell them apart, at least what follows
    the layer's number.
    """
    distinct = sorted(set(kinds))
    after = {kind: kind.rsplit("#.", 1)[-1] for kind in distinct}
    labels = list(after.values())
    return {kind: after[kind] if labels.count(after[kind]) == 1 else kind for kind in distinct}


def expert_label(document: Document, expert: int) -> str:
    """The expert's name, or its number."""
    names = document.get("expert_names") or ()
    return str(names[expert]) if expert < len(names) else str(expert)


def specialists(document: Document) -> dict[str, list[dict[str, Any]]]:
    """By domain the experts with the highest lower bound of lift: site, expert, lift with bounds, share of the load."""
    routing = document.get("routing") or {}
    lift, sites = routing.get("lift") or {}, routing.get("sites", ())
    labels = site_labels([s["kind"] for s in sites])
    out = {}
    for domain, bounds in lift.items():
        ranked = sorted(
            ((low, value, i, e) for i, row in enumerate(bounds["low"]) for e, low in enumerate(row)
             for value in [bounds["value"][i][e]]),
            key=lambda found: (-found[0], -found[1], found[2:]),
        )  # fmt: skip
        out[domain] = [
            {
                "layer": sites[i]["layer"],
                "site": labels[sites[i]["kind"]],
                "expert": expert_label(document, e),
                "value": value,
                "low": low,
                "high": bounds["high"][i][e],
                "share": routing["load"][domain][i][e],
                "balanced": 1 / sites[i]["experts"],
            }
            for low, value, i, e in ranked[:STRONGEST]
        ]
    return out


def definitions(value: Any, path: str = "") -> list[tuple[str, str]]:
    """A nested value as rows of (path, text), in its order."""
    if isinstance(value, Mapping) and value:
        return [row for key, inner in value.items() for row in definitions(inner, f"{path} › {key}" if path else key)]
    if isinstance(value, list | tuple):
        return [(path, ", ".join(str(v) for v in value) or "none")]
    return [(path, "none" if value is None or value == {} else str(value))]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def key_figures(documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Rows of the comparison: ``label``, ``cells`` (text by run), and ``best``: the indices of the best runs.

    ``best`` is empty where more is neither better nor worse, or where all runs agree.
    """
    rows = [
        _row("Load entropy, mean over sites", documents, lambda d: _mean(_of(d, "entropy_of_load")), "{:.3f}"),
        _row("MaxVio, mean over sites", documents, lambda d: _mean(_of(d, "max_violation")), "{:.3f}", -1),
        _row("Experts with under a tenth of the balanced load", documents, _dead, "{:.0f}", -1),
        _row("Information about the domain (NMI) above chance", documents, _above_chance, "{:.3f}"),
    ]
    for domain in _names(documents, "perplexity"):
        rows.append(_row(f"Loss, {domain}", documents, lambda d, n=domain: _score(d, "perplexity", n, "loss"), *LOSS))
    for name in _names(documents, "multiple_choice"):
        rows.append(_row(f"Accuracy, {name}", documents, lambda d, n=name: _score(d, "multiple_choice", n, "accuracy"),
                         "{:.1%}", 1))  # fmt: skip
    for name in _names(documents, "exact_match"):
        rows.append(_row(f"Exact match, {name}", documents, lambda d, n=name: _score(d, "exact_match", n), "{:.1%}", 1))
    return [row for row in rows if any(row["values"])]


LOSS = ("{:.4f}", -1)


def _row(label: str, documents: Sequence[Document], value: Any, form: str, sign: int = 0) -> dict[str, Any]:
    """``sign``: 1 where more is better, -1 where less is, 0 where neither."""
    values = [value(d) for d in documents]
    cells = ["not measured" if v is None else form.format(v) for v in values]
    numbers = [sign * v for v in values if v is not None]
    differ = sign != 0 and len({c for c in cells if c != "not measured"}) > 1
    best = [
        i for i, v in enumerate(values) if differ and v is not None and cells[i] == form.format(max(numbers) * sign)
    ]
    return {"label": label, "cells": cells, "best": best, "values": [v is not None for v in values]}


def _of(document: Document, key: str) -> Sequence[float | None]:
    found: Sequence[float | None] = (document.get("routing") or {}).get(key, ())
    return found


def _dead(document: Document) -> float | None:
    routing = document.get("routing")
    return float(sum(len(d or ()) for d in routing["dead"])) if routing else None


def _above_chance(document: Document) -> float | None:
    found = (document.get("routing") or {}).get("specialisation")
    return float(found["above_chance"]) if found else None


def _names(documents: Sequence[Document], part: str) -> list[str]:
    """Domains or tasks in the order in which the documents name them."""
    return list(dict.fromkeys(n for d in documents for n in (d.get("scores") or {}).get(part) or ()))


def _score(document: Document, part: str, name: str, key: str = "") -> float | None:
    found = ((document.get("scores") or {}).get(part) or {}).get(name)
    if found is None:
        return None
    return float((found[key] if key else found)["value"])


def other_data(documents: Sequence[Document]) -> list[str]:
    """Domains that are not the same documents in all runs, by the digests of their provenance."""
    digests: dict[str, set[str]] = {}
    for document in documents:
        for domain, data in ((document.get("provenance") or {}).get("data") or {}).items():
            digests.setdefault(domain, set()).add(str(data.get("sha256")))
    return sorted(domain for domain, found in digests.items() if len(found) > 1)
