"""The Triton kernels of ``mix_glu`` in the interpreter, against the formula in float64.

An error may be twice that of plain PyTorch in the same dtype, plus a few units of the last place: 2 of them in
bfloat16 (the interpreter cuts float32 off there where a GPU rounds), 8 in float32 (both are nearly exact, and which
one is nearer is chance), 1 in float16. Memory that nobody writes holds NaN.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from molora.activations import ACTIVATIONS
from molora.kernels.glu import eager as glu_eager
from molora.kernels.glu.eager import Glu
from molora.kernels.glu.ops import mix_glu
from molora.kernels.rank.launch import INTERPRETED
from tests.support.glu_cases import (
    CASES,
    NAMES,
    Case,
    by_the_formula,
    cotangents,
    in_float64,
    off_by,
    operands,
    results,
)

UNITS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 2}
HARD = Case(33, 70, (5, 3, 8), 2, "gelu", empty=True)


def by_plain_pytorch(g: Glu) -> dict[str, Tensor]:
    with torch.no_grad():
        out = glu_eager.forward(g)
        found = glu_eager.backward(g, *cotangents(out), [True] * 8)
    named = zip(NAMES, found, strict=True)
    return {"hbar": out[0], "H2": out[1], **{f"d{n}": d for n, d in named if d is not None}}


def assert_near_the_formula(g: Glu) -> None:
    double = in_float64(g)
    exact, plain = results(double, by_the_formula(double)), by_plain_pytorch(g)
    found = results(g, mix_glu(*g))
    assert found.keys() == exact.keys() == plain.keys()
    for what, x in found.items():
        assert x.dtype == plain[what].dtype
        limit = 2 * off_by(plain[what], exact[what]) + UNITS[g.U.dtype] * torch.finfo(g.U.dtype).eps
        assert off_by(x, exact[what]) <= limit, (what, off_by(x, exact[what]), limit)


def test_the_kernels_run_in_the_interpreter_on_poisoned_memory() -> None:
    assert INTERPRETED
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_as_near_the_formula_as_plain_pytorch(name: str, dtype: torch.dtype) -> None:
    assert_near_the_formula(operands(CASES[name], dtype))


def test_float16_is_as_near_the_formula_as_plain_pytorch() -> None:
    assert_near_the_formula(operands(HARD, torch.float16))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation_and_its_slope(act: str) -> None:
    assert_near_the_formula(operands(HARD._replace(act=act), torch.float32))


def test_float32_parameters_over_bfloat16_products() -> None:
    g = operands(HARD, torch.bfloat16)
    B1, B3, A2 = (x.detach().float().requires_grad_() for x in g[4:7] if isinstance(x, Tensor))
    assert_near_the_formula(g._replace(B1=B1, B3=B3, A2=A2))


def test_rows_with_gaps_transposed_tensors_and_narrow_ids() -> None:
    g = operands(HARD, torch.float32, wants_grad=False)

    def gap(x: Tensor) -> Tensor:
        return torch.full((x.shape[0], x.shape[1] + 3), torch.nan).narrow(1, 1, x.shape[1]).copy_(x)

    def turned(x: Tensor) -> Tensor:
        return x.t().contiguous().t()

    strange = g._replace(
        **{n: gap(getattr(g, n)) for n in ("U", "H1", "weights")},
        **{n: turned(getattr(g, n)) for n in ("V", "H3", "B1", "A2")},
        ids=turned(g.ids).to(torch.int32),
        expert=torch.stack([g.expert, -g.expert], 1)[:, 0],
        scale1=torch.stack([g.scale1, -g.scale1], 1)[:, 0],
    )
    for a, b in zip(mix_glu(*g), mix_glu(*strange), strict=True):
        assert torch.equal(a, b)
    for each in (g, strange):
        for x in each[:8]:
            x.requires_grad_()
    want, got = results(g, mix_glu(*g)), results(strange, mix_glu(*strange))
    for what, x in got.items():
        assert torch.equal(x, want[what]), what


@pytest.mark.parametrize(
    "asked", [("U",), ("weights",), ("H3", "V"), ("B1",), ("B3", "H1"), ("A2",), ("U", "V", "H1", "H3", "weights")]
)
def test_some_gradients_alone_have_the_bits_they_have_among_all(asked: tuple[str, ...]) -> None:
    g = operands(HARD, torch.float16)
    whole = results(g, mix_glu(*g))
    alone = g._replace(**{n: getattr(g, n).detach() for n in NAMES if n not in asked})
    found = results(alone, mix_glu(*alone))
    assert set(found) == {"hbar", "H2", *(f"d{n}" for n in asked)}
    for what, x in found.items():
        assert torch.equal(x, whole[what]), what


def test_each_run_gives_the_same_bits() -> None:
    g = operands(HARD, torch.bfloat16)
    first = results(g, mix_glu(*g))
    for what, x in results(g, mix_glu(*g)).items():
        assert torch.equal(x, first[what]), what


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # inf * 0 in what is then hidden
def test_an_empty_slot_hides_infinities_and_nan() -> None:
    g = operands(Case(4, 6, (2, 2), 2), torch.float32)
    with torch.no_grad():
        g.U[0], g.V[1] = torch.inf, torch.nan
    g.ids[:2, 0], g.ids[:2, 1] = -1, 2
    out = results(g, mix_glu(*g))
    for what, x in out.items():
        assert torch.isfinite(x).all(), what
    for what in ("hbar", "H2", "dU", "dV", "dH1", "dH3", "dweights"):
        assert not out[what][:2].any(), what


@pytest.mark.parametrize("without", [{"tokens": 0}, {"slots": 0}, {"width": 0}, {"ranks": (0, 0)}], ids=str)
def test_nothing_of_one_kind_gives_zeros_where_a_sum_is_empty(without: dict[str, int]) -> None:
    case = HARD._replace(**without)  # type: ignore[arg-type]
    g = operands(case, torch.float32)
    found, plain = results(g, mix_glu(*g)), by_plain_pytorch(g)
    for what, x in found.items():
        torch.testing.assert_close(x, plain[what], msg=what)
        assert "ranks" in without or not x.any()
