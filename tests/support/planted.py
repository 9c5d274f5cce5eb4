"""A mixture whose experts are known to be for one domain each: four made-up domains, an adapter trained on each alone.

A domain owns fifteen tokens and a rule that makes the next token from the last one. The gates are trained to pick the
adapter that has the domain's name, so whatever looks for specialisation has to find just that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import molora
from molora.data.examples import Collator, Example
from tests.support import tiny

WIDTH, START, LENGTH = 15, 2, (12, 25)  # tokens of a domain; the token that all documents begin with; of a document
NOISE = 0.1  # share of tokens that follow no rule
RULES: dict[str, Callable[[int], int]] = {  # on the tokens of a domain, from 0
    "up": lambda x: x + 1,
    "down": lambda x: x - 1,
    "double": lambda x: 2 * x + 3,
    "skip": lambda x: x + 4,
}


def documents(domain: str, count: int, seed: int) -> list[Example]:
    """Texts of one domain; every token is a label."""
    g = torch.Generator().manual_seed(1000 * seed + list(RULES).index(domain))
    first = 4 + WIDTH * list(RULES).index(domain)

    def any_of(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=g))

    out = []
    for _ in range(count):
        x, ids = any_of(0, WIDTH), [START]
        for _ in range(any_of(*LENGTH)):
            ids.append(first + x)
            x = any_of(0, WIDTH) if torch.rand((), generator=g) < NOISE else RULES[domain](x) % WIDTH
        out.append(Example(input_ids=ids, labels=ids))
    return out


def _train(model: Any, rows: Sequence[Example], steps: int, rate: float) -> nn.Module:
    """Batches of 16 in the order of the rows."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    model.train()
    for step in range(steps):
        chunk = [rows[(16 * step + i) % len(rows)] for i in range(16)]
        optimizer.zero_grad()
        model(**Collator(0)(chunk)).loss.backward()
        optimizer.step()
    return model.eval()


def _base() -> Any:
    """With a sharper head: that of a fresh model gives probabilities too flat to be right with."""
    base = tiny.base_model("llama")
    with torch.no_grad():
        base.lm_head.weight.mul_(8)
    return base


def planted(folder: Path) -> tuple[Any, dict[str, list[Example]]]:
    """The mixture, in eval mode, and twelve texts of each domain that it was not trained on; the same every time.

    ``folder``: where the adapters go that it is made of.
    """
    adapters = {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in RULES:
            expert = molora.convert(_base(), "lora", r=4)
            _train(expert, documents(name, 256, seed=1), steps=60, rate=1e-2)
            expert.export_expert(0, folder / name)
            adapters[name] = str(folder / name)
        model = molora.convert(_base(), "meteora", adapters=adapters, top_k=1, gate_loss_coef=1.0)
        own = [documents(name, 64, seed=2) for name in RULES]
        rows = [Example(**row, task_ids=d) for four in zip(*own, strict=True) for d, row in enumerate(four)]
        _train(model, rows, steps=120, rate=3e-2)
    return model, {name: documents(name, 12, seed=3) for name in RULES}


def dealt(rows: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """The control: as many texts of every domain under each name, so that the names say nothing."""
    names = list(rows)
    return {n: [row for own in rows.values() for row in own[g :: len(names)]] for g, n in enumerate(names)}
