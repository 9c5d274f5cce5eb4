"""Offsets beyond 2**31 elements: rows that lie further apart than an int32 reaches, in memory that is never touched.

The interpreter wraps int32 as a GPU does, so a product that was not widened would read somewhere else.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from torch import Tensor

from molora.kernels import functional
from molora.kernels.rank.launch import REACH
from molora.kernels.sorted import ops as grouped_ops
from tests.kernels.interpreted.cases import DEVICE, Case, tensors
from tests.support.tolerances import close

MAP_NORESERVE = 0x4000  # mman.h of Linux
STEP = 2**30 + 64  # elements between rows; the third row is past 2**31
SHAPES = {"I": 40, "O": 33, "ranks": (8, 4)}
CASE = Case(T=4, **SHAPES)
# Tiles that start far away, of rows near each other: the last of these rows is past 2**31.
MANY = Case(T=520, **SHAPES)
CLOSE = REACH - 64

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU lends no memory that is not there; see test_gpu.py")


def far(t: Tensor, step: int = STEP) -> Tensor:
    """The same values with ``step`` elements between rows; only the pages that hold them exist."""
    size = (t.shape[0] * step + t.numel()) * t.element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    view = torch.frombuffer(memory, dtype=t.dtype).as_strided(t.shape, (step, 1))
    with torch.no_grad():
        view.copy_(t)
    return view.requires_grad_(t.requires_grad)


def test_the_memory_lies_past_an_int32():
    view = far(torch.arange(12.0).view(4, 3))
    assert 3 * view.stride(0) > 2**31
    assert (MANY.T - 1) * CLOSE > 2**31
    assert torch.equal(view, torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize(
    ("name", "case", "step"),
    [*((n, CASE, STEP) for n in ("x", "base", "A", "B")), *((n, MANY, CLOSE) for n in ("x", "base", "grad"))],
)
def test_rank_mix(name: str, case: Case, step: int):
    """Value and gradients, with one operand or the gradient of y spread out."""
    a = tensors(case)

    def run(given: dict[str, Tensor], spread: bool) -> list[Tensor]:
        names = ("base", "x", "A", "B", "weights", "ids")
        y = functional.rank_mix(*(given[n] for n in names), expert_R=a["expert"], scale_R=a["scale"])
        grad = torch.linspace(-1, 1, y.numel()).view_as(y)
        grad = far(grad, step) if spread else grad
        return [y, *torch.autograd.grad(y, [given[n] for n in names[:5]], grad)]

    there = {**a} if name == "grad" else {**a, name: far(a[name], step)}
    for got, wanted in zip(run(there, name == "grad"), run(a, False), strict=True):
        close(got, wanted, "same_math_fp32")


@pytest.mark.parametrize("name", ["x", "base"])
def test_sorted_and_slots(name: str):
    a = tensors(CASE)
    spread = {**a, name: far(a[name])}
    groups = {"start_E": torch.tensor([0, 8, 12]), "scale_R": a["scale"], "max_rank": 8}
    maps = {"expert_R": a["expert"], "scale_R": a["scale"]}
    for run in (
        lambda g: grouped_ops.sorted_mix(*(g[n] for n in ("base", "x", "A", "B", "weights", "ids")), **groups),
        lambda g: functional.expand_slots(*(g[n] for n in ("base", "x", "A", "B", "ids")), **maps),
    ):
        close(run(spread), run(a), "same_math_fp32")


@pytest.mark.parametrize("name", ["U", "V"])
def test_mix_glu(name: str):
    a = tensors(CASE)
    g = torch.Generator().manual_seed(1)
    T, F, R = 4, 33, 12
    given = {"U": torch.randn(T, F, generator=g), "V": torch.randn(T, F, generator=g)}
    h = [torch.randn(T, R, generator=g) for _ in range(2)]
    rest = (a["B"], a["B"], torch.randn(R, F, generator=g), a["weights"], a["ids"], a["expert"], *[a["scale"]] * 3, 2)

    def run(at: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return functional.mix_glu(at["U"], at["V"], *h, *rest)

    for got, wanted in zip(run({**given, name: far(given[name])}), run(given), strict=True):
        close(got, wanted, "same_math_fp32")
