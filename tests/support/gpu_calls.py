"""Every operator on small shapes, as calls of nothing: for the tests that watch a GPU, and for ``compute-sanitizer``.

``python -m tests.support.gpu_calls [device]`` runs them all, forward and backward, and prints how many.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from molora.kernels import functional

__all__ = ["CALLS", "inputs", "step"]

E, RANK, K = 4, 8, 2
R = E * RANK
Given = dict[str, Tensor]


def inputs(tokens: int, device: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Given:
    """Armed leaves and routing; another seed routes other ways."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "base": (tokens, 96),
        "x": (tokens, 64),
        "A": (R, 64),
        "B": (96, R),
        "U": (tokens, 96),
        "V": (tokens, 96),
        "H1": (tokens, R),
        "H3": (tokens, R),
        "A2": (R, 96),
        "h": (tokens, K, 96),
        "down": (tokens, 64),
    }
    leaves = {n: torch.randn(s, generator=g).to(device, dtype).requires_grad_() for n, s in shapes.items()}
    weights = torch.rand(tokens, K, generator=g).to(device).requires_grad_()
    ids = torch.rand(tokens, E, generator=g).argsort(-1)[:, :K].to(device)
    maps = {"expert": torch.arange(E).repeat_interleave(RANK), "start": torch.arange(E + 1) * RANK}
    maps["ends"] = torch.arange(1, E + 1) * tokens // E
    rest = {n: t.to(device) for n, t in maps.items()}
    W = torch.randn(96, 64, generator=g).to(device, dtype)
    return {**leaves, "weights": weights, "ids": ids, "scale": torch.ones(R, device=device), "W": W, **rest}


def _maps(a: Given) -> dict[str, Any]:
    return {"expert_R": a["expert"], "scale_R": a["scale"]}


def _groups(a: Given) -> dict[str, Any]:
    return {"start_E": a["start"], "scale_R": a["scale"], "max_rank": RANK}


def _glu(a: Given) -> Tensor:
    products = (a[n] for n in ("U", "V", "H1", "H3", "B", "B", "A2", "weights", "ids", "expert"))
    hbar, h2 = functional.mix_glu(*products, *[a["scale"]] * 3, E)
    return torch.cat((hbar, h2), 1)


CALLS: dict[str, Callable[[Given], Tensor]] = {
    "rank_mix": lambda a: functional.rank_mix(a["base"], a["x"], a["A"], a["B"], a["weights"], a["ids"], **_maps(a)),
    "rank_mix_linear": lambda a: functional.rank_mix_linear(
        a["x"], a["W"], None, a["A"], a["B"], a["weights"], a["ids"], **_maps(a)
    ),
    "expand_slots": lambda a: functional.expand_slots(a["base"], a["x"], a["A"], a["B"], a["ids"], **_maps(a)),
    "contract_slots": lambda a: functional.contract_slots(
        a["down"], a["h"], a["weights"], a["A2"], a["A"].t(), a["ids"], **_maps(a)
    ),
    "sorted_mix": lambda a: functional.sorted_mix(
        a["base"], a["x"], a["A"], a["B"], a["weights"], a["ids"], **_groups(a)
    ),
    "grouped_lora": lambda a: functional.grouped_lora(a["x"], a["A"], a["B"], a["ends"], a["scale"]),
    "mix_glu": _glu,
}


def step(name: str, a: Given) -> list[Tensor]:
    """The value of one call and the gradients of all it depends on."""
    y = CALLS[name](a)
    leaves = [t for t in a.values() if t.requires_grad]
    found = torch.autograd.grad(y.float().sum(), leaves, allow_unused=True)
    return [y, *(t for t in found if t is not None)]


if __name__ == "__main__":
    device = sys.argv[1] if len(sys.argv) > 1 else "cuda"
    for tokens in (1, 17, 130):
        for name in CALLS:
            assert all(t.isfinite().all() for t in step(name, inputs(tokens, device))), name
    print(f"{len(CALLS)} operators ran forward and backward on {device}")
