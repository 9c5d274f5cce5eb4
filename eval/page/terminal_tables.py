"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from molora.data.examples import Example, Record, learned
from molora.data.records import source

__all__ = ["data_table", "result_table", "verdicts"]


def data_table(
    sources: Mapping[str, Any],
    train_records: Mapping[str, int],
    heldout_records: Mapping[str, Sequence[Record]],
    heldout: Mapping[str, Sequence[Example]],
) -> Table:
    """What each domain is made of; all arguments by domain."""
    table = Table("domain", "source", title="Domains", title_justify="left")
    for column in ("to train on", "held out", "its labels"):
        table.add_column(column, justify="right")
    for name, value in sources.items():
        numbers = (train_records[name], len(heldout_records[name]), sum(map(learned, heldout[name])))
        table.add_row(name, source(value).path, *(f"{n:,}" for n in numbers))
    return table


def result_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Held-out loss per domain and exact match per task, one column a run; the best of each row in bold.

    ``runs``: name to ``{"heldout_loss": {domain: nats}, "exact_match": {task: share}}``, and for trained ones
    ``trainable_parameters`` and ``train_seconds``.
    """
    table = Table("", title="Held-out loss (nats per token, lower is better) and exact match", title_justify="left")
    for name in runs:
        table.add_column(name, justify="right")
    first = next(iter(runs.values()))
    for domain in first["heldout_loss"]:
        values = [run["heldout_loss"][domain] for run in runs.values()]
        table.add_row(f"loss {domain}", *_marked(values, min(values), "{:.3f}"))
    for i, task in enumerate(first["exact_match"]):
        values = [run["exact_match"][task] for run in runs.values()]
        table.add_section() if i == 0 else None
        table.add_row(f"exact match {task}", *_marked(values, max(values), "{:.0%}"))
    table.add_section()
    for key, label, form in (
        ("trainable_parameters", "trainable parameters", "{:,}"),
        ("train_seconds", "training time", "{:.0f} s"),
    ):
        table.add_row(label, *(form.format(run[key]) if key in run else "" for run in runs.values()))
    return table


def _marked(values: list[float], best: float, form: str) -> list[str]:
    return [f"[bold]{form.format(v)}[/]" if v == best else form.format(v) for v in values]


def verdicts(runs: Mapping[str, Mapping[str, Any]], reference: str) -> dict[str, list[str]]:
    """For each run but the reference: the domains whose held-out loss is not below the reference's."""
    base = runs[reference]["heldout_loss"]
    return {
        name: [d for d, loss in run["heldout_loss"].items() if not loss < base[d]]
        for name, run in runs.items()
        if name != reference
    }
