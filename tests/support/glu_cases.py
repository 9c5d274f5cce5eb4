"""Operands of ``mix_glu``, its formula token by token in float64, and the rule of how far a result may be from it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from molora.kernels.glu.eager import Glu

NAMES = ("U", "V", "H1", "H3", "B1", "B3", "A2", "weights")


class Case(NamedTuple):
    """``empty``: which of the ids -1, -2, E and E + 3 stand in every third slot; their weights are NaN."""

    tokens: int
    width: int
    ranks: tuple[int, ...]
    slots: int
    act: str = "silu"
    empty: bool = False
    duplicates: bool = False
    absent: tuple[str, ...] = ()


CASES = {
    "one_token": Case(1, 40, (4, 4), 1),
    "two_slots": Case(17, 70, (8,) * 4, 2),
    "ragged_ranks_empty_slots": Case(66, 33, (5, 3, 7), 2, "gelu", empty=True),
    "every_expert": Case(16, 32, (4,) * 3, 3, "gelu_tanh"),
    "rank_0_expert_all_empty_kinds": Case(13, 30, (6, 0, 10), 2, "relu", empty=True),
    "duplicate_choices": Case(9, 31, (8,) * 2, 2, duplicates=True, empty=True),
    "more_slots_than_are_unrolled": Case(13, 48, (3,) * 6, 5, empty=True),
    "largest_total_rank": Case(33, 70, (16,) * 8, 2, empty=True),
    "no_gate_experts": Case(10, 24, (4,) * 3, 2, absent=("H1", "B1"), empty=True),
    "no_up_experts": Case(10, 24, (4,) * 3, 2, "gelu", absent=("H3", "B3")),
    "no_down_experts": Case(10, 24, (4,) * 3, 2, absent=("A2",)),
    "no_experts_but_weights": Case(10, 24, (4,) * 3, 2, absent=("H1", "B1", "H3", "B3", "A2"), empty=True),
}


def operands(case: Case, dtype: torch.dtype, wants_grad: bool = True) -> Glu:
    """Operands of order 1, so that every term of every sum shows; B is far from zero."""
    g = torch.Generator().manual_seed(11)
    T, width, K = case.tokens, case.width, case.slots
    R, E = sum(case.ranks), len(case.ranks)
    shapes = ((T, width), (T, width), (T, R), (T, R), (width, R), (width, R), (R, width))
    sizes = (1.0, 1.0, 1.0, 1.0, 0.5, 0.5, max(width, 1) ** -0.5)
    leaves: dict[str, Tensor | None] = {}
    for name, shape, size in zip(NAMES, shapes, sizes, strict=False):
        x = (torch.randn(shape, generator=g, dtype=torch.float64) * size).to(dtype)
        leaves[name] = None if name in case.absent else x.requires_grad_(wants_grad)
    wide = torch.promote_types(dtype, torch.float32)
    ids = torch.rand(T, E, generator=g).argsort(-1)[:, :K]
    if case.duplicates:
        ids[::2] = ids[::2, :1]
    weights = torch.rand(T, K, generator=g, dtype=torch.float64).to(wide) - 0.2
    if case.empty:
        slot = torch.arange(T * K).view(T, K)
        strange = torch.tensor([-1, -2, E, E + 3])[slot // 3 % 4]
        ids = torch.where(slot % 3 == 0, strange, ids)
        weights = weights.masked_fill(slot % 3 == 0, torch.nan)
    expert = torch.repeat_interleave(torch.arange(E), torch.tensor(case.ranks))
    scales = [(torch.rand(R, generator=g) + 0.5).to(wide) for _ in range(3)]
    parts = [leaves[name] for name in NAMES[:7]]
    return Glu(*parts, weights.requires_grad_(wants_grad), ids, expert, *scales, E, case.act)  # type: ignore[arg-type]


def in_float64(g: Glu) -> Glu:
    """The same values as leaves in float64."""

    def exact(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().double().requires_grad_(x.requires_grad)

    return Glu(*(exact(x) for x in g[:8]), *g[8:10], *(x.double() for x in g[10:13]), *g[13:])  # type: ignore[arg-type]


def activation(act: str, u: Tensor) -> Tensor:
    if act == "relu":
        return u.clamp_min(0)
    if act == "silu":
        return u / (1 + (-u).exp())
    return F.gelu(u, approximate="tanh" if act == "gelu_tanh" else "none")


def by_the_formula(g: Glu) -> tuple[Tensor, Tensor]:
    """hbar and H2, token by token and slot by slot."""
    hbars, downs = [], []
    for t in range(g.U.shape[0]):
        hbar, down = g.U[t] * 0, g.U.new_zeros(0 if g.A2 is None else g.A2.shape[0])
        for j in range(g.ids.shape[1]):
            e = int(g.ids[t, j])
            if not 0 <= e < g.num_experts:
                continue
            mine = (g.expert == e).nonzero().flatten()
            u, v, w = g.U[t], g.V[t], g.weights[t, j]
            if g.H1 is not None and g.B1 is not None:
                u = u + g.B1[:, mine] @ (g.H1[t, mine] * g.scale1[mine])
            if g.H3 is not None and g.B3 is not None:
                v = v + g.B3[:, mine] @ (g.H3[t, mine] * g.scale3[mine])
            h = activation(g.act, u) * v
            hbar = hbar + w * h
            if g.A2 is not None:
                down = down.index_add(0, mine, w * g.scale2[mine] * (g.A2[mine] @ h))
        hbars.append(hbar)
        downs.append(down)
    return torch.stack(hbars), torch.stack(downs)


def cotangents(out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """What to weigh the results with: the same for every dtype, and exact in each."""
    gen = torch.Generator().manual_seed(12)
    hbar, H2 = (torch.randint(-8, 9, x.shape, generator=gen).to(x.dtype) / 4 for x in out)
    return hbar, H2


def gradients(g: Glu, out: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The gradients of the results weighed with ``cotangents``."""
    leaves = {n: x for n, x in zip(NAMES, g[:8], strict=True) if x is not None and x.requires_grad}
    outs, weighed = zip(*((x, c) for x, c in zip(out, cotangents(out), strict=True) if x.requires_grad), strict=True)
    found = torch.autograd.grad(outs, list(leaves.values()), weighed, allow_unused=True)
    return {f"d{n}": torch.zeros_like(x) if d is None else d for (n, x), d in zip(leaves.items(), found, strict=True)}


def results(g: Glu, out: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Both results and all gradients by name."""
    return {"hbar": out[0].detach(), "H2": out[1].detach(), **gradients(g, out)}


def off_by(got: Tensor, exact: Tensor) -> float:
    """The largest error as a share of the largest value."""
    if not exact.numel():
        return 0.0
    error, size = (got.double() - exact).abs().max().item(), exact.abs().max().item()
    return error / size if size else error
