"""``molora bench cpu``: SmolLM2-135M in float32 on this machine's cores, beside the installed PEFT, in one process.

Every figure is a ratio of medians of interleaved runs. Nothing is timed before the outputs agree.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import subjects
from benchmarks.memory import peak_mib
from benchmarks.timing import ROOT, interleaved, keep_freed_memory, machine, ratio
from molora.surgery.install import sites_of

EXPERTS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Line:
    """One figure with its goal; ``at_least`` turns the comparison round."""

    name: str
    value: float
    goal: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


def agree(ours: Any, theirs: Any) -> float:
    """Largest difference of X-LoRA logits from PEFT's; raises when they are not the same function."""
    subjects.same_head(ours, theirs)
    a, b = subjects.forward(ours)(), subjects.forward(theirs)()
    difference = float((a - b).abs().max() / b.abs().max())
    if difference > 1e-4 or not torch.equal(subjects.generation(ours, 8)(), subjects.generation(theirs, 8)()):
        raise AssertionError(f"molora's X-LoRA and PEFT's disagree by {difference:.1e} of the largest logit: not timed")
    return difference


def rank_products(num_experts: int) -> Any:
    """The bare matrix products of ``num_experts`` experts of rank 8 on every site: the yardstick of the curve."""
    T, r = subjects.ROWS * subjects.TOKENS, subjects.MOLA["r"]
    shapes = [(m.site.in_features, m.site.out_features) for _, m in sites_of(subjects.mola(4)).values()]
    unique = {
        s: (
            torch.randn(T, s[0]),
            torch.randn(num_experts * r, s[0]),
            torch.randn(s[1], num_experts * r),
            torch.randn(T, s[1]),
        )
        for s in set(shapes)
    }

    def run() -> None:
        with torch.no_grad():
            for s in shapes:
                x, A, B, y = unique[s]
                torch.addmm(y, x @ A.t(), B.t())

    return run


def curve(rounds: int, progress: Progress) -> tuple[list[dict[str, float]], Line]:
    """Cost of MoLA's forward over the base's, and of its rank products alone, from 4 to 64 experts.

    On a busy machine the cost may come out as nothing or less; the line is then missed, whatever the ratio says.
    """
    work = {"base": subjects.forward(subjects.base())}
    for e in EXPERTS:
        work[f"mola {e}"] = subjects.forward(subjects.mola(e))
        work[f"products {e}"] = rank_products(e)
    seconds = interleaved(work, rounds, progress, "4 to 64 experts")
    rows = []
    for e in EXPERTS:
        extra = statistics.median(m - b for m, b in zip(seconds[f"mola {e}"], seconds["base"], strict=True))
        rows.append({"experts": e, "extra_s": extra, "products_s": statistics.median(seconds[f"products {e}"])})
    growth, allowed = (rows[-1][k] / rows[0][k] for k in ("extra_s", "products_s"))
    if min(row["extra_s"] for row in rows) <= 0:
        growth = sys.float_info.max
    return rows, Line("MoLA cost, 64 over 4 experts, against its rank products' growth", growth, allowed)


def measure(quick: bool, progress: Progress) -> tuple[list[Line], dict[str, Any]]:
    """Every section; ``quick`` cuts repetitions and leaves out memory and the long generation."""
    rounds, lines, record = (2 if quick else 5), [], {}
    ours, theirs = subjects.xlora(), subjects.peft_xlora()
    record["xlora_relative_difference"] = agree(ours, theirs)

    steps = interleaved(
        {"mola": subjects.training_step(subjects.mola()), "peft": subjects.training_step(subjects.peft_lora())},
        rounds,
        progress,
        "training steps",
    )
    lines.append(Line("MoLA training step over PEFT LoRA r=64 step", ratio(steps, "mola", "peft"), 1.20))
    base = subjects.forward(subjects.base())
    blocks = interleaved(
        {
            "base": base,
            "mixlora": subjects.forward(subjects.mixlora()),
            "mixlora K=1": subjects.forward(subjects.mixlora(1)),
        },
        rounds if quick else 4 * rounds + 1,  # short, and the goal is close
        progress,
        "MixLoRA forwards",
    )
    lines.append(Line("MixLoRA forward over base", ratio(blocks, "mixlora", "base"), 1.35))
    lines.append(Line("MixLoRA forward, K=2 over K=1", ratio(blocks, "mixlora", "mixlora K=1"), 1.20))
    passes = interleaved(
        {"base": base, "xlora": subjects.forward(ours), "peft xlora": subjects.forward(theirs)},
        rounds,
        progress,
        "X-LoRA forwards",
    )
    lines.append(Line("X-LoRA forward over base", ratio(passes, "xlora", "base"), 2.15))
    record["peft_xlora_forward_over_base"] = ratio(passes, "peft xlora", "base")
    record["seconds"] = {"steps": steps, "mixlora forwards": blocks, "xlora forwards": passes}
    for tokens, goal in ((16, 4.0),) if quick else ((64, 4.0), (256, 9.0)):
        lines.append(_generate(ours, theirs, tokens, goal, quick, progress, record))
    record["curve"], line = curve(rounds, progress)
    lines.append(line)
    if not quick:
        task = progress.add_task("peak memory", total=len(subjects.SUBJECTS))
        record["peak_mib"] = {}
        for name in subjects.SUBJECTS:
            record["peak_mib"][name] = peak_mib(name)
            progress.advance(task)
    return lines, record


def _generate(
    ours: Any, theirs: Any, tokens: int, goal: float, quick: bool, progress: Progress, record: dict[str, Any]
) -> Line:
    """X-LoRA's greedy generation against PEFT's: medians of five, or for the long one three against a single run."""
    own, peer = (1, 1) if quick else (5, 5) if tokens <= 64 else (3, 1)
    task = progress.add_task(f"{tokens} new tokens", total=own + peer)
    seconds: dict[str, list[float]] = {"molora": [], "peft": []}
    for n in range(max(own, peer)):
        for name, model, runs in (("molora", ours, own), ("peft", theirs, peer)):
            if n < runs:
                start = time.perf_counter()
                subjects.generation(model, tokens)()
                seconds[name].append(time.perf_counter() - start)
                progress.advance(task)
    record["seconds"][f"generate {tokens}"] = seconds
    speedup = statistics.median(seconds["peft"]) / statistics.median(seconds["molora"])
    return Line(f"X-LoRA generation of {tokens} tokens, speed-up over PEFT", speedup, goal, at_least=True)


def show(lines: list[Line], record: dict[str, Any], console: Console) -> None:
    """The figures as tables."""
    table = Table("figure", "measured", "goal", "", title="molora bench cpu", title_justify="left")
    for line in lines:
        sign = ">=" if line.at_least else "<="
        verdict = "[green]met[/]" if line.met else "[red]missed[/]"
        table.add_row(line.name, f"{line.value:.2f}x", f"{sign} {line.goal:.2f}x", verdict)
    console.print(table)
    console.print(f"PEFT's X-LoRA forward over base: {record['peft_xlora_forward_over_base']:.2f}x")
    growth = Table("experts", "cost over base, ms", "rank products, ms", title="MoLA, K=2, r=8", title_justify="left")
    for row in record["curve"]:
        growth.add_row(str(row["experts"]), f"{row['extra_s'] * 1e3:.1f}", f"{row['products_s'] * 1e3:.1f}")
    console.print(growth)
    if "peak_mib" in record:
        memory = Table("subject (a process of its own)", "peak MiB", title="Memory", title_justify="left")
        for name, mib in record["peak_mib"].items():
            memory.add_row(name, f"{mib:,.0f}")
        console.print(memory)


def main(out: Path | None = None, check: bool = False, quick: bool = False) -> int:
    """Measure, print, write a dated JSON; with ``check``, 1 when a goal was missed."""
    torch.set_num_threads(os.cpu_count() or 1)
    record_allocator = keep_freed_memory()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console, started = Console(), time.perf_counter()
    with Progress(console=console) as progress:
        lines, record = measure(quick, progress)
    show(lines, record, console)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = out or ROOT / "benchmarks" / "results" / f"cpu-{today}{'-quick' if quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    figures = [{**asdict(line), "met": line.met} for line in lines]
    result = {"date": today, "machine": machine(), "threads": torch.get_num_threads(), "allocator": record_allocator}
    result |= {"figures": figures, **record}
    result["wall_s"] = round(time.perf_counter() - started, 1)
    path.write_text(json.dumps(result, indent=1) + "\n")
    console.print(f"{result['wall_s']:.0f} s; written to {path}")
    return int(check and not all(line.met for line in lines))
