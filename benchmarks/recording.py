"""What counting the routing costs: ``python -m benchmarks.recording`` prints its share of the forward, and memory.

The time is that of SmolLM2-135M on this machine's CPU, with and without the recorder, interleaved; the memory that
of the counts after a million tokens of made-up routing at the same sites, all of them new documents and words.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks import subjects
from benchmarks.timing import interleaved, machine, ratio
from molora import context
from molora.eval.counting.counter import RoutingRecorder
from molora.eval.counting.watch import collect_routing
from molora.eval.scoring.fresh_process import peak_gb
from molora.routing import Routing

GOAL_SHARE, GOAL_MB, TOKENS = 0.05, 100.0, 1_000_000
ROWS, LENGTH = 4, 512


def added(model: Any, name: str, rounds: int, progress: Progress) -> float:
    """Share of a forward's time that counting adds: median over rounds, of forwards in turn."""
    forward, owner = subjects.forward(model), model._molora.owner
    with collect_routing(model) as recorder:

        def counted() -> None:
            with recorder.batch("text"):
                forward()

        def plain() -> None:
            with context.taping(owner, None):  # the same model without a tape
                forward()

        seconds = interleaved({"plain": plain, "counted": counted}, rounds, progress, name)
    return ratio(seconds, "counted", "plain") - 1


def memory(model: Any) -> dict[str, float]:
    """MB that a recorder holds after a million tokens, and by how much the process's peak grew."""
    recorder = RoutingRecorder(model, seed=0, samples=8, sample_tokens=128, vocabulary=True)
    generator, before = torch.Generator().manual_seed(0), peak_gb()
    valid_BS = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    routings = {}
    for s in recorder.sites:
        logits_TE = torch.randn(ROWS * LENGTH, s.experts, generator=generator)
        weights_TK, ids_TK = logits_TE.softmax(-1).topk(s.choices, -1)
        routings[s.path] = Routing(weights_TK, ids_TK, None, logits_TE)
    for start in range(0, TOKENS, ROWS * LENGTH):
        ids_BS = torch.randint(0, recorder.vocabulary_size, (ROWS, LENGTH), generator=generator)
        with recorder.batch(f"domain {start // LENGTH % 3}"):
            recorder.before({"input_ids": ids_BS})
            for path, routing in routings.items():
                recorder.add(path, routing, valid_BS)
            recorder.digest()
    return {"held_mb": recorder.nbytes() / 1e6, "peak_grew_mb": (peak_gb() - before) * 1024}


def main(rounds: int = 15) -> int:
    """Measure both mixtures and print the record; 1 when a goal is missed."""
    out: dict[str, Any] = {"machine": machine(), "goals": {"share": GOAL_SHARE, "mb": GOAL_MB}}
    with Progress(console=Console(stderr=True)) as progress:
        for name, make in (("mixture of blocks", subjects.mixlora), ("mixture of linears", subjects.mola)):
            model = make()
            out[name] = {"added_share": added(model, name, rounds, progress), **memory(model)}
    print(json.dumps(out, indent=1))  # noqa: T201 printing is the command's purpose
    found = [v for v in out.values() if "added_share" in v]
    return int(any(v["added_share"] > GOAL_SHARE or v["held_mb"] > GOAL_MB for v in found))


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
