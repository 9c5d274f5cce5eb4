"""An evaluation in the terminal: the verdict, then one table for each part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from molora.eval.verdict import Statement, verdict

__all__ = ["show_comparison", "show_document", "verdict_panel"]

MARKS = {"good": ("green", "✓"), "warn": ("yellow", "!"), "bad": ("red", "✗"), "unknown": ("dim", "?")}
BLOCKS = " ▁▂▃▄▅▆▇█"
FULL = 2.5  # times the even load that fills a block
WIDEST = 16  # experts of a site that are drawn one by one
ROWS = 32
STRONGEST = 3


def verdict_panel(statements: Sequence[Statement], title: str) -> Panel:
    """The statements, each with a mark that does not need its colour."""
    lines = []
    for s in statements:
        colour, mark = MARKS[s.level]
        lines.append(Text.assemble((f"{mark} {s.title}. ", f"bold {colour}"), s.text))
    return Panel(Group(*lines), title=escape(title), title_align="left")


def show_document(document: Mapping[str, Any], console: Console) -> None:
    """The verdict, and a table for each section that there is."""
    console.print(verdict_panel(verdict(document), str(document.get("name", ""))))
    for part in _parts(document):
        console.print(part)


def _parts(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    names = document.get("expert_names")
    if "routing" in document:
        yield from _load_tables(document["routing"], names)
        if document["routing"]["lift"] is not None:
            yield _lift_table(document["routing"], names)
    if "ablation" in document:
        yield _ablation_table(document["ablation"])
    if "scores" in document:
        yield from _score_tables({str(document.get("name", "")): document})


def _expert(e: int, names: Sequence[str] | None) -> str:
    return escape(names[e]) if names and e < len(names) else str(e)


def _load_tables(routing: Mapping[str, Any], names: Sequence[str] | None) -> Iterator[Table]:
    """One table a kind of site; a row a layer: a bar for each expert's load, and the figures of balance."""
    kinds: dict[str, list[int]] = {}
    for i, site in enumerate(routing["sites"]):
        kinds.setdefault(site["kind"], []).append(i)
    for kind, sites in kinds.items():
        most = max(routing["sites"][i]["experts"] for i in sites)
        experts = ", ".join(map(escape, names)) if names else f"experts 0 to {most - 1}"
        table = Table("layer", experts, title=f"Load of {escape(kind)}", title_justify="left")
        for column in ("busiest", "idle", "in use", "undecided"):
            table.add_column(column, justify="right")
        shown = sites if len(sites) <= ROWS else sites[:: -(-len(sites) // ROWS)]
        for i in shown:
            site, load = routing["sites"][i], routing["load_of_all"][i]
            bars = [_block(share * site["experts"]) for share in load]
            wide = " ".join(b * 2 for b in bars) if most <= WIDEST else "".join(bars)
            table.add_row(str(site["layer"]), wide, *_figures(routing, i))
        left_out = f"{len(shown)} of {len(sites)} layers are shown. " if len(shown) < len(sites) else ""
        table.caption = (
            f"{left_out}{_block(1.0)}: the even load. Busiest: times its even load; idle: experts below a tenth of "
            "theirs; in use: effective experts; undecided: mean entropy of a token's choice, of 1."
        )
        yield table


def _block(times_even: float) -> str:
    return BLOCKS[min(round(times_even / FULL * (len(BLOCKS) - 1)), len(BLOCKS) - 1)]


def _figures(routing: Mapping[str, Any], i: int) -> list[str]:
    violation, used = routing["max_violation"][i], routing["effective_experts"][i]
    if violation is None:
        return ["no token"] + [""] * 3
    idle, entropy = len(routing["dead"][i]), routing["mean_entropy"][i]
    return [f"{violation + 1:.1f}x", str(idle), f"{used:.1f}", f"{entropy:.2f}"]


def _lift_table(routing: Mapping[str, Any], names: Sequence[str] | None) -> Table:
    """The experts that a domain uses most beyond the others, with bounds that leave 1 out."""
    table = Table("domain", "its experts, beyond the other domains' use of them (95 % interval)", title_justify="left")
    table.title = "Lift: how many times its mean share over the domains an expert gets from one"
    for domain, lift in routing["lift"].items():
        found = [
            (lift["value"][i][e], lift["low"][i][e], lift["high"][i][e], i, e)
            for i, own in enumerate(lift["value"])
            for e in range(len(own))
            if lift["low"][i][e] > 1
        ]
        best = sorted(found, reverse=True)[:STRONGEST]
        cells = [
            f"layer {routing['sites'][i]['layer']} expert {_expert(e, names)}: {value:.2f} ({low:.2f} to {high:.2f})"
            for value, low, high, i, e in best
        ]
        table.add_row(escape(domain), "; ".join(cells) or "none that chance would not explain")
    return table


def _ablation_table(ablation: Mapping[str, Any]) -> Table:
    table = Table("what is changed", title="Loss with changed routing, less the loss as trained", title_justify="left")
    for domain in ablation["loss"]:
        table.add_column(escape(domain), justify="right")
    table.add_row("(as trained)", *(f"{v['value']:.3f}" for v in ablation["loss"].values()), style="dim")
    kind = ""
    for change in ablation["interventions"]:
        if change["kind"] != kind:
            table.add_section()
        kind = change["kind"]
        cells = []
        for domain, v in change["delta"].items():
            text = f"{v['value']:+.3f} ({v['low']:+.3f} to {v['high']:+.3f})"
            cells.append(f"[bold]{text}[/]" if domain == change["worst"] else text)
        table.add_row(escape(change["name"]), *cells)
    table.caption = "bold: the domain that suffers most, where that is beyond doubt"
    return table


def _score_tables(documents: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """One column a run; a row a domain or a set of questions."""
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for name, document in documents.items():
        scores = document.get("scores", {})
        for domain, own in scores.get("perplexity", {}).items():
            cell = f"{own['loss']['value']:.3f} ({own['loss']['low']:.3f} to {own['loss']['high']:.3f})"
            rows.setdefault(("loss", domain), {})[name] = cell
        for task, own in scores.get("multiple_choice", {}).items():
            for key in ("accuracy", "accuracy_normalised"):
                rows.setdefault((key.replace("_", ", "), task), {})[name] = _share(own[key])
        for task, own in scores.get("exact_match", {}).items():
            rows.setdefault(("exact match", task), {})[name] = _share(own)
    if not rows:
        return
    table = Table("", "", title="Scores (95 % interval)", title_justify="left")
    for name in documents:
        table.add_column(escape(name), justify="right")
    for (what, domain), cells in rows.items():
        table.add_row(what, escape(domain), *(cells.get(name, "") for name in documents))
    yield table


def _share(value: Mapping[str, Any]) -> str:
    return f"{value['value']:.0%} ({value['low']:.0%} to {value['high']:.0%})"


def show_comparison(documents: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Two or more runs side by side: their verdicts, then their scores."""
    named = {str(d.get("name", i)): d for i, d in enumerate(documents)}
    table = Table("", *map(escape, named), title="Verdicts", title_justify="left")
    for row in zip(*(verdict(d) for d in named.values()), strict=True):
        table.add_row(row[0].key, *(Text(f"{MARKS[s.level][1]} {s.title}", MARKS[s.level][0]) for s in row))
    console.print(table)
    for scores in _score_tables(named):
        console.print(scores)
