"""A plan as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from molora.training.arguments import Arguments
from molora.training.plan.counts import Kind
from molora.training.plan.dry_run import dry_run
from molora.training.plan.overview import Plan

__all__ = ["GIB", "plan_tables", "show_plan"]

GIB = 2**30


def show_plan(arguments: Arguments, gpus: int | None, console: Console) -> None:
    """Print the plan of a dry run and what it rests on, once; without ``gpus``, for the processes that were launched.

    Raises:
        ConfigError: as :func:`molora.training.plan.dry_run.dry_run`.
    """
    found = dry_run(arguments, arguments.training.world_size if gpus is None else gpus)
    if arguments.training.process_index:
        return
    for table in plan_tables(found.plan):
        console.print(table)
    for note in found.notes:
        style = "yellow" if note.startswith("missing") else ""
        console.print(note, style=style, highlight=False, markup=False, soft_wrap=True)


def plan_tables(plan: Plan) -> tuple[Table, ...]:
    """Sites, parameters by kind, steps, and memory and traffic by ZeRO stage."""
    return _sites(plan), _parameters(plan.kinds), _steps(plan), _memory(plan)


def _table(title: str, words: Sequence[str], numbers: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in words:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _sites(plan: Plan) -> Table:
    title = f"Sites: {plan.recipe} on {plan.model}"
    table = _table(title, ("linears", "role"), ("sites", "routers", "experts", "choices", "ranks"))
    for g in plan.sites:
        values = (", ".join(map(str, v)) or "all" for v in (g.experts, g.choices, g.ranks))
        table.add_row(", ".join(g.names), g.role, f"{g.sites:,}", f"{g.routers:,}", *values)
    return table


def _parameters(kinds: Sequence[Kind]) -> Table:
    table = _table("Parameters", ("kind",), ("all", "trained", "GiB as stored"))
    for k in kinds:
        table.add_row(k.name, f"{k.parameters:,}", f"{k.trained:,}", _gib(k.bytes))
    table.add_section()
    total = [sum(values) for values in zip(*((k.parameters, k.trained, k.bytes) for k in kinds), strict=True)]
    table.add_row("together", f"{total[0]:,}", f"{total[1]:,}", _gib(total[2]))
    return table


def _steps(plan: Plan) -> Table:
    batch = plan.batch
    table = _table("Steps", ("", ""), ())
    table.show_header = False
    table.add_row("world size", f"{batch.gpus:,} GPUs")
    product = f"{batch.micro} a GPU x {batch.accumulation} accumulated x {batch.gpus} GPUs = {batch.rows:,}"
    table.add_row("rows a step", product)
    table.add_row("tokens a step", f"at most {batch.rows * batch.length:,}, {batch.length:,} a row")
    table.add_row("training rows", "unknown" if plan.rows is None else f"{plan.rows:,}")
    table.add_row("optimizer steps", "unknown" if plan.steps is None else f"{plan.steps:,}")
    return table


def _memory(plan: Plan) -> Table:
    kept = "with" if plan.checkpointing else "without"
    title = f"GiB on a GPU, and sent in a step (activations estimated, {kept} checkpointing)"
    columns = ("base", "adapters", "gradients", "AdamW", "activations", "GPU", "host", "sent")
    table = _table(title, ("ZeRO",), columns)
    for m, (_, sent) in zip(plan.memory, plan.traffic, strict=True):
        parts = (m.base, m.adapters, m.gradients, m.optimizer, m.activations, m.gpu, m.host, sent)
        table.add_row(m.stage.removeprefix("ZeRO-"), *map(_gib, parts))
    if plan.expert_parallel:
        spread = _gib(plan.expert_parallel)
        table.caption = f"With the experts spread over GPUs, each would send {spread} for its tokens."
        table.caption_justify = "left"
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:,.2f}"
