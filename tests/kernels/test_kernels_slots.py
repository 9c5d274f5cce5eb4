"""The slot kernels of the ffn unit against loops in float64: expand (T, K, F) and contract (T, D)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molora.kernels.reference import Layout, contract_slots, expand_slots, mix_slots
from tests.kernels.test_kernels_reference import layout_of
from tests.support.tolerances import close

# (tokens, D, F, ranks, scales, K, empty): with ``empty``, every third slot holds no expert.
CASES = {
    "no_tokens": (0, 5, 7, (3, 3), (2.0, 2.0), 1, False),
    "one_token": (1, 5, 7, (3, 3), (2.0, 2.0), 2, False),
    "odd_sizes": (63, 13, 11, (3,) * 5, (2.0,) * 5, 2, False),
    "k_is_one": (17, 6, 9, (2, 2), (0.5, 0.5), 1, False),
    "k_is_e": (17, 6, 9, (2, 2, 2), (0.5,) * 3, 3, False),
    "ragged": (17, 6, 9, (1, 4, 2), (0.5, 2.0, 1.25), 2, False),
    "ragged_with_empty_expert": (17, 6, 9, (1, 0, 2), (0.5, 2.0, 1.25), 2, False),
    "rank_one": (17, 6, 9, (1, 1, 1), (0.5, 0.5, 0.5), 2, False),
    "empty_slots": (17, 6, 9, (2, 2, 2), (0.5,) * 3, 3, True),
}
Parts = tuple[dict[str, Tensor], Tensor, Layout]


def setup(case: str) -> Parts:
    T, D, F, ranks, scales, K, empty = CASES[case]
    g = torch.Generator().manual_seed(7)
    R = sum(ranks)
    up = {"base": (T, F), "x": (T, D), "A": (R, D), "B": (F, R)}
    shapes = {**up, "h": (T, K, F), "down_A": (R, F), "down_B": (D, R), "w": (T, K), "down_base": (T, D)}
    leaves = {n: torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    ids = torch.rand(T, len(ranks), generator=g).argsort(-1)[:, :K]
    if empty:
        ids = torch.where(torch.arange(ids.numel()).view_as(ids) % 3 == 0, -1, ids)
    return leaves, ids, layout_of(ranks, scales)


def rows(ids: Tensor, layout: Layout) -> Tensor:
    """Empty slots take the row after the last expert's."""
    return torch.where(ids < 0, len(layout.ranks), ids).flatten()


def delta(x: Tensor, A: Tensor, B: Tensor, e: int, layout: Layout) -> Tensor:
    """s_e B_e A_e x of one token; nothing for expert -1."""
    if e < 0:
        return B.sum(1) * 0
    start = sum(layout.ranks[:e])
    out = B.sum(1) * 0
    for j in range(start, start + layout.ranks[e]):
        out = out + layout.scales[e] * B[:, j] * (A[j] * x).sum()
    return out


def expand_loop(leaves: dict[str, Tensor], ids: Tensor, layout: Layout) -> Tensor:
    slots = [
        leaves["base"][t] + delta(leaves["x"][t], leaves["A"], leaves["B"], int(ids[t, k]), layout)
        for t in range(ids.shape[0])
        for k in range(ids.shape[1])
    ]
    empty = leaves["base"].unsqueeze(1).expand(*ids.shape, -1) * 1
    return torch.stack(slots).view(*ids.shape, -1) if slots else empty


def contract_loop(leaves: dict[str, Tensor], ids: Tensor, layout: Layout) -> Tensor:
    tokens = []
    for t in range(ids.shape[0]):
        parts = [
            leaves["w"][t, k] * delta(leaves["h"][t, k], leaves["down_A"], leaves["down_B"], int(ids[t, k]), layout)
            for k in range(ids.shape[1])
        ]
        tokens.append(leaves["down_base"][t] + torch.stack(parts).sum(0))
    return torch.stack(tokens) if tokens else leaves["down_base"] * 1


def expand(leaves: dict[str, Tensor], ids: Tensor, layout: Layout) -> Tensor:
    # The kernel may write into the tensor that it makes of the base, never into the base itself.
    return expand_slots(leaves["base"], leaves["x"], leaves["A"], leaves["B"], rows(ids, layout), ids.shape[1], layout)


def contract(leaves: dict[str, Tensor], ids: Tensor, layout: Layout) -> Tensor:
    given = (leaves[n] for n in ("down_base", "h", "w", "down_A", "down_B"))
    return contract_slots(*given, rows(ids, layout), layout)


PAIRS = {
    "expand": (expand, expand_loop, ("base", "x", "A", "B")),
    "contract": (contract, contract_loop, ("down_base", "h", "w", "down_A", "down_B")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PAIRS)
def test_slots_are_the_formula(name: str, case: str):
    kernel, loop, inputs = PAIRS[name]
    leaves, ids, layout = setup(case)
    got, expected = kernel(leaves, ids, layout), loop(leaves, ids, layout)
    assert got.shape == expected.shape
    close(got, expected, "formula")
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = (
        torch.autograd.grad(y, [leaves[n] for n in inputs], seed, allow_unused=True) for y in (got, expected)
    )
    for n, a, b in zip(inputs, ours, theirs, strict=True):
        close(*(torch.zeros_like(leaves[n]) if t is None else t for t in (a, b)), "formula")


@pytest.mark.parametrize("name", PAIRS)
def test_slots_gradcheck(name: str):
    kernel, _, inputs = PAIRS[name]
    leaves, ids, layout = setup("ragged")
    small = {
        n: (t[:3] if n in ("base", "down_base", "x", "h", "w") else t).detach().requires_grad_()
        for n, t in leaves.items()
    }

    def f(*given: Tensor) -> Tensor:
        return kernel({**small, **dict(zip(inputs, given, strict=True))}, ids[:3], layout)

    assert torch.autograd.gradcheck(f, tuple(small[n] for n in inputs))


def test_contract_into_the_base():
    """``overwrite`` writes the same sum into the base itself."""
    leaves, ids, layout = setup("odd_sizes")
    with torch.no_grad():
        wanted, base = contract(leaves, ids, layout), leaves["down_base"].clone()
        got = contract_slots(
            base,
            leaves["h"],
            leaves["w"],
            leaves["down_A"],
            leaves["down_B"],
            rows(ids, layout),
            layout,
            overwrite=True,
        )
    assert got is base
    assert torch.equal(got, wanted)


def test_slot_kernels_do_not_change_their_inputs():
    leaves, ids, layout = setup("odd_sizes")
    before = {n: t.detach().clone() for n, t in leaves.items()}
    with torch.no_grad():
        expand(leaves, ids, layout)
        contract(leaves, ids, layout)
    assert all(torch.equal(leaves[n], t) for n, t in before.items())


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_mix_slots(slots: int):
    """Value, gradient and second gradient of ``sum_k w h``."""
    g = torch.Generator().manual_seed(3)
    h = torch.randn(5, slots, 4, generator=g, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, slots, generator=g, dtype=torch.float64, requires_grad=True)
    close(mix_slots(h, w), (h * w.unsqueeze(-1)).sum(1), "formula")
    assert torch.autograd.gradcheck(mix_slots, (h, w))
    assert torch.autograd.gradgradcheck(mix_slots, (h, w))
