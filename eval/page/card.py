"""What an evaluation found, on the model card of the adapter that it is about: a few lines of its README.md."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.adapter.atomic_save import CARD, edit_card
from molora.adapter.card_section import put
from molora.adapter.folder import read_adapter
from molora.errors import ConfigError
from molora.eval.page.tables import specialists
from molora.eval.verdict import verdict

__all__ = ["routing_section", "write_card"]

FAVOURITES = 3  # experts named for a domain
_MARKDOWN = re.compile(r"[^\w .,:;()/%+-]")

Document = Mapping[str, Any]


def write_card(document: Document, folder: str | os.PathLike[str]) -> Path:
    """Put :func:`routing_section` into the README.md of the adapter in ``folder``, in place of one that is there.

    The section is bound to the digest of the weights: a later save of other weights takes it out.

    Raises:
        ConfigError: for an evaluation of other weights, or without anything to say about routing.
        AdapterError, CheckpointError: for a folder that is no whole adapter, or cannot be written. The card then is as
            it was.
    """
    folder, text = Path(folder), routing_section(document)
    told = (document["provenance"].get("adapter") or {}).get("sha256")

    def edit(card: str) -> str:
        own = read_adapter(folder).sha256
        if told != own:
            raise ConfigError(
                f"{folder}: its weights have the sha256 {own[:12]}..., the evaluation {document.get('name')!r} is of "
                f"{str(told)[:12]}...; evaluate this adapter, or name the folder that was evaluated"
            )
        return put(card, own, text)

    read_adapter(folder)  # before a folder that is none is locked and written into
    edit_card(folder, edit)
    return folder / CARD


def routing_section(document: Document) -> str:
    """Markdown: the verdict with its figures, a table of the routers, one of the domains, and how it was measured.

    Raises:
        ConfigError: for a document with neither routing nor ablation.
    """
    if not document.get("routing") and not document.get("ablation"):
        raise ConfigError(
            f"{document.get('name')}: holds neither routing nor an ablation; run `molora eval routing` or `ablate`"
        )
    said = "\n".join(f"- **{s.title}.** {s.text}" for s in verdict(document))
    parts = ["## Routing", said, _figures(document), _domains(document), _measured(document)]
    return "\n\n".join(p for p in parts if p)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _figures(document: Document) -> str:
    """Mean and range over the routers."""
    routing = document.get("routing") or {}
    kinds = {
        "max_violation": "MaxVio: what the busiest expert gets above its even share, over that share (0 is even)",
        "effective_experts": "Experts in effective use",
        "entropy_of_load": "Entropy of the load (0 is one expert for all, 1 is even)",
        "mean_entropy": "Entropy of a token's probabilities (0 is decided, 1 is even)",
    }
    rows = []
    for key, label in kinds.items():
        values = [v for v in routing.get(key, ()) if v is not None]
        if values:
            mean = sum(values) / len(values)
            rows.append([label, f"{mean:.2f}", f"{min(values):.2f} to {max(values):.2f}"])
    found = routing.get("specialisation")
    if found:
        low, high = found["interval"]
        label = f"Information that expert and domain share (NMI; {found['chance']:.3f} with shuffled labels)"
        rows.append([label, f"{found['nmi']:.3f}", f"{low:.3f} to {high:.3f}"])
    return _table(["figure", "value", "range over routers, or interval"], rows)


def _domains(document: Document) -> str:
    """Each domain's favourites, and its loss as trained and with the gates of all tokens shuffled."""
    routing, ablation = document.get("routing") or {}, document.get("ablation") or {}
    named = {i["name"]: i["delta"] for i in ablation.get("interventions", ())}
    loss, shuffled, favourites = ablation.get("loss") or {}, named.get("shuffled") or {}, _favourites(document)
    columns = {
        "favourite experts (lift)": favourites,
        "loss, nats a token": {d: f"{v['value']:.3f}" for d, v in loss.items()},
        "with shuffled gates": {
            d: f"{v['value']:+.3f} ({v['low']:+.3f} to {v['high']:+.3f})" for d, v in shuffled.items()
        },
    }
    columns = {head: cells for head, cells in columns.items() if cells}
    rows = [
        [_plain(d), *(cells.get(d, "not measured") for cells in columns.values())]
        for d in dict.fromkeys([*routing.get("domains", ()), *loss])
    ]
    return _table(["domain", *columns], rows) if columns else ""


def _favourites(document: Document) -> dict[str, str]:
    """The experts that a domain uses more than all tokens do, beyond doubt, by the lower bound of their lift."""
    out = {}
    for domain, ranked in specialists(document).items():
        sure = [e for e in ranked if e["low"] > 1][:FAVOURITES]
        named = "" if document.get("expert_names") else "expert "
        places = [f"{named}{_plain(e['expert'])} on {_place(e)} ({e['value']:.1f}x)" for e in sure]
        out[domain] = ", ".join(places) or "none beyond doubt"
    return out


def _place(expert: Mapping[str, Any]) -> str:
    return _plain(f"layer {expert['layer']}, {expert['site']}" if expert["layer"] >= 0 else expert["site"])


def _measured(document: Document) -> str:
    provenance = document["provenance"]
    data, settings, versions = (provenance.get(k) or {} for k in ("data", "settings", "versions"))
    documents, tokens = (sum(d.get(k, 0) for d in data.values()) for k in ("documents", "tokens"))
    domains = ", ".join(f"{_plain(n)} ({d.get('tokens', 0):,})" for n, d in data.items())
    lines = [
        f"Measured on {tokens:,} tokens of {documents:,} documents; tokens by domain: {domains}." if data else "",
        f"Settings: {_plain(', '.join(f'{k} {v}' for k, v in settings.items()))}." if settings else "",
        "Intervals are 95 % bootstrap bounds over documents. Lift: an expert's share of a domain over its mean share.",
        f"By `molora eval`, molora {_plain(str(versions['molora']))}." if versions.get("molora") else "",
    ]
    return "\n".join(line for line in lines if line)


def _plain(text: object) -> str:
    """``text`` in one line, with whatever Markdown or HTML could read as more than text as character references."""
    shown = "".join(c if c.isprintable() else " " for c in str(text))
    return _MARKDOWN.sub(lambda m: f"&#{ord(m[0])};", " ".join(shown.split()))
