"""Inputs, the float64 answer, and the rule of closeness for tests of Triton kernels.

They run compiled where there is a CUDA device, and under ``TRITON_INTERPRET=1`` on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molora.kernels.rank import eager, launch, ops
from tests.support.tolerances import close

DEVICE = "cpu" if launch.INTERPRETED else "cuda"
# Two units in the last place: the interpreter cuts float32 to bfloat16 where a GPU rounds.
FLOOR = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 2**-6 if launch.INTERPRETED else 2**-8}


class Case(NamedTuple):
    """Shapes and routing of one mixture."""

    T: int = 17
    I: int = 40  # noqa: E741
    O: int = 33  # noqa: E741
    ranks: tuple[int, ...] = (8, 8, 8, 8)
    K: int = 2
    form: str = "top_k"  # or "dense", "always"
    routing: str = "uniform"
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype | None = None
    layout: str = "plain"  # of x


def tensors(case: Case, seed: int = 0) -> dict[str, Any]:
    """Armed arguments of ``rank_mix`` as leaves, and the description of the ranks."""
    g = torch.Generator().manual_seed(seed)
    E, R, params = len(case.ranks), sum(case.ranks), case.param_dtype or case.dtype

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype).to(DEVICE)

    weights = ids = None
    if case.form == "dense":
        weights = draw(case.T, E)
    elif case.form == "top_k":
        weights, ids = draw(case.T, case.K), pick(case, g).to(DEVICE)
        weights.view(-1)[::5] = 0.0  # a chosen expert of weight 0 has a gradient
    scale = [0.5 + e / 4 for e, r in enumerate(case.ranks) for _ in range(r)]
    owner = [e for e, r in enumerate(case.ranks) for _ in range(r)]
    leaves = {
        "base": draw(case.T, case.O, dtype=case.dtype),
        "x": laid_out(draw(case.T, case.I, dtype=case.dtype), case.layout),
        "A": draw(R, case.I, dtype=params) / case.I**0.5,
        "B": draw(case.O, R, dtype=params) / max(R, 1) ** 0.5,
        "weights": weights,
    }
    leaves = {n: None if t is None else t.detach().requires_grad_() for n, t in leaves.items()}
    maps = {"expert": torch.tensor(owner, device=DEVICE), "scale": torch.tensor(scale, device=DEVICE)}
    return {**leaves, "ids": ids, **maps}


def pick(case: Case, g: torch.Generator) -> Tensor:
    """(T, K) ids of the named routing."""
    E, shape = len(case.ranks), (case.T, case.K)
    if E < case.K and case.routing == "uniform":
        return torch.zeros(shape, dtype=torch.int64)
    if case.routing == "one":
        return torch.full(shape, E - 1)
    if case.routing == "dropped":
        return torch.randint(-1, E + 1, shape, generator=g)
    if case.routing == "same":  # twice the same expert in a token
        return torch.randint(0, E, (case.T, 1), generator=g).expand(shape).contiguous()
    if case.routing == "half":  # some experts idle
        return torch.randint(0, max(E // 2, 1), shape, generator=g)
    return (
        torch.stack([torch.randperm(E, generator=g)[: case.K] for _ in range(case.T)])
        if case.T
        else torch.zeros(shape).long()
    )


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in other memory."""
    if layout == "slice":  # rows of a wider matrix, 4 bytes off any alignment
        wide = torch.full((x.shape[0], x.shape[1] + 7), torch.nan, dtype=x.dtype, device=x.device)
        wide[:, 3 : 3 + x.shape[1]] = x
        return wide[:, 3 : 3 + x.shape[1]]
    return x.t().contiguous().t() if layout == "transposed" else x


def gates_TR(weights: Tensor | None, ids: Tensor | None, expert: Tensor, scale: Tensor, T: int) -> Tensor:
    """The factor of each rank, written from its definition."""
    if weights is None:
        return scale.double().expand(T, -1)
    if ids is None:
        return weights.double()[:, expert] * scale
    chosen_TKR = ids.unsqueeze(-1) == expert
    return (chosen_TKR * weights.double().unsqueeze(-1)).sum(1) * scale


def exact(a: dict[str, Any]) -> Tensor:
    """``base + ((x A^T) * g) B^T`` in float64."""
    g = gates_TR(a["weights"], a["ids"], a["expert"], a["scale"], a["x"].shape[0])
    return a["base"].double() + (a["x"].double() @ a["A"].double().t() * g) @ a["B"].double().t()


def gradients(y: Tensor, leaves: dict[str, Tensor], seed: int = 9) -> dict[str, Tensor]:
    """Of a random sum of y, by name."""
    g = torch.Generator().manual_seed(seed)
    grad = torch.randn(y.shape, generator=g).to(y.device)
    found = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return dict(zip(leaves, found, strict=True))


def leaves_of(a: dict[str, Any]) -> dict[str, Tensor]:
    """The differentiable arguments."""
    return {n: t for n, t in a.items() if t is not None and t.requires_grad}


@contextmanager
def steps(module: Any) -> Iterator[None]:
    """Run the operators with other steps: ``eager`` instead of the kernels."""
    before = ops.steps_for
    import molora.kernels.rank.slot_ops as slot_ops

    ops.steps_for = slot_ops.steps_for = lambda x: module
    try:
        yield
    finally:
        ops.steps_for = slot_ops.steps_for = before


def same_rows(a: Tensor, b: Tensor) -> None:
    """Rows that were computed at another place in a tile are equal: in every bit on a GPU.

    In the interpreter a product is numpy's, whose BLAS may round by a row's place.
    """
    if launch.INTERPRETED:
        close(a, b, "interpreter_fp32")
    else:
        assert torch.equal(a, b)


def distance(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the difference over that of ``wanted``."""
    if not wanted.numel():
        return 0.0
    size = wanted.double().square().mean().sqrt()
    return float((got.double() - wanted.double()).square().mean().sqrt() / size.clamp_min(1e-30))


def check(
    a: dict[str, Any], run: Callable[[dict[str, Any]], Tensor], answer: Callable[[dict[str, Any]], Tensor]
) -> None:
    """Value and every gradient: at most twice as far from float64 as plain PyTorch in the same dtype.

    Under NaN-filled allocations: what a kernel leaves unwritten shows.
    """
    leaves = leaves_of(a)
    wanted = {"y": (y := answer(a)).detach(), **gradients(y, leaves)}
    got = {"y": (y := run(a)).detach(), **gradients(y, leaves)}
    with steps(eager):
        plain = {"y": (y := run(a)).detach(), **gradients(y, leaves)}
    dtype = a["x"].dtype if "x" in a else a["h"].dtype
    for name, value in got.items():
        assert value.shape == wanted[name].shape
        assert value.dtype == (y if name == "y" else leaves[name]).dtype
        ours, theirs = distance(value, wanted[name]), distance(plain[name], wanted[name])
        assert ours <= 2 * theirs + FLOOR[dtype], f"{name}: off by {ours:.2e}, plain PyTorch by {theirs:.2e}"
