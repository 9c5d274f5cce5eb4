"""The sorted and the gather kernels against float64: value and every gradient, over shapes, routings and dtypes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora.kernels import tiles as configs
from molora.kernels.sorted import eager as grouped_eager
from molora.kernels.sorted import ops as grouped_ops
from tests.kernels.interpreted.cases import (
    DEVICE,
    FLOOR,
    Case,
    distance,
    exact,
    gradients,
    leaves_of,
    same_rows,
    tensors,
)

BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "no_tokens": Case(T=0),
    "one_token": Case(T=1, ranks=(16,) * 4),
    "two_tokens": Case(T=2, ranks=(4,), K=1, I=33),
    "a_tile": Case(T=16, I=128, O=128, ranks=(16,) * 2),
    "a_row_over_a_tile": Case(T=17, ranks=(4,), K=1),
    "unequal_ranks": Case(T=33, ranks=(5, 3, 7), I=97),
    "a_rank_of_nothing": Case(T=16, ranks=(4, 0, 2)),
    "every_rank_an_expert": Case(T=15, ranks=(1,) * 12, O=65),
    "many_ranks": Case(T=20, ranks=(64,) * 3, I=64, O=64),
    "as_many_ranks_as_a_program_holds": Case(T=20, ranks=(128, 70), I=64, O=64, K=1),
    "large_tiles": Case(T=100, I=64, O=70, ranks=(16,) * 2),
    "all_to_one": Case(T=40, routing="one", ranks=(8,) * 3),
    "idle_experts": Case(T=33, routing="half", ranks=(8,) * 6, K=1),
    "dropped_tokens": Case(T=33, routing="dropped", K=3, ranks=(8,) * 2),
    "an_expert_twice": Case(T=20, routing="same", ranks=(8,) * 3),
    "every_expert_chosen": Case(T=20, K=3, ranks=(8,) * 3),
    "sliced": Case(layout="slice", ranks=(8, 8)),
    "transposed": Case(layout="transposed", ranks=(8, 8)),
    "float32_params": Case(T=17, dtype=BF16, param_dtype=torch.float32, ranks=(8,) * 3),
    "bfloat16": Case(T=33, dtype=BF16, I=64, O=64),
    "bfloat16_large_tiles": Case(T=140, dtype=BF16, I=64, O=64, ranks=(32,) * 2),
    "float16": Case(T=33, dtype=FP16, I=64, O=64, ranks=(5, 8, 7)),
}


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs keep it busy, so that sums are cut into few parts: the interpreter runs them one by one."""
    monkeypatch.setattr(configs, "PROGRAMS", 8)


def described(a: dict[str, Any], ranks: tuple[int, ...]) -> dict[str, Any]:
    start = torch.tensor([sum(ranks[:e]) for e in range(len(ranks) + 1)], device=DEVICE)
    return {"start_E": start, "scale_R": a["scale"], "max_rank": max(ranks)}


def mixed(a: dict[str, Any], ranks: tuple[int, ...]) -> Tensor:
    given = (a[n] for n in ("base", "x", "A", "B", "weights", "ids"))
    return grouped_ops.sorted_mix(*given, **described(a, ranks))


def check(
    a: dict[str, Any], run: Callable[[], Tensor], answer: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice as far from float64 as plain PyTorch in the same dtype, under NaN-filled allocations."""
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    leaves = leaves_of(a)

    def all_of(f: Callable[[], Tensor]) -> dict[str, Tensor]:
        y = f()
        return {"y": y.detach(), **gradients(y, leaves)}

    wanted, got = all_of(answer), all_of(run)
    with monkeypatch.context() as patch:
        patch.setattr(grouped_ops, "_steps", lambda x: grouped_eager)
        plain = all_of(run)
    for name, value in got.items():
        like = leaves[name] if name in leaves else plain["y"]
        assert (value.shape, value.dtype) == (like.shape, like.dtype)
        ours, theirs = distance(value, wanted[name]), distance(plain[name], wanted[name])
        assert ours <= 2 * theirs + FLOOR[a["x"].dtype], f"{name}: off by {ours:.2e}, plain PyTorch by {theirs:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str, monkeypatch: pytest.MonkeyPatch):
    a = tensors(CASES[name])
    check(a, lambda: mixed(a, CASES[name].ranks), lambda: exact(a), monkeypatch)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        T=st.integers(0, 35),
        I=st.integers(1, 40),
        O=st.integers(1, 70),
        ranks=st.lists(st.integers(0, 20), min_size=2, max_size=4).map(tuple).filter(any),
        K=st.integers(1, 2),
        routing=st.sampled_from(["uniform", "one", "dropped", "same", "half"]),
        layout=st.sampled_from(["plain", "slice", "transposed"]),
        form=st.just("top_k"),
        dtype=st.just(torch.float32),
        param_dtype=st.none(),
    )
)
def test_any_shape_equals_float64(case: Case):
    a = tensors(case)
    with pytest.MonkeyPatch.context() as patch:
        check(a, lambda: mixed(a, case.ranks), lambda: exact(a), patch)


def test_sums_in_one_part_equal_float64(monkeypatch: pytest.MonkeyPatch):
    """A GPU that is busy already: gradients of the parameters are not cut into parts."""
    monkeypatch.setattr(configs, "PROGRAMS", 1)
    case = Case(T=40, ranks=(8,) * 2)
    a = tensors(case)
    check(a, lambda: mixed(a, case.ranks), lambda: exact(a), monkeypatch)


@pytest.mark.parametrize("alone", ["base", "x", "A", "B", "weights"])
def test_each_gradient_alone_is_the_same(alone: str):
    case = Case(T=12, ranks=(8, 8))
    a = tensors(case)
    together = gradients(mixed(a, case.ranks), leaves_of(a))[alone]
    for name, t in leaves_of(a).items():
        t.requires_grad_(name == alone)
    assert torch.equal(gradients(mixed(a, case.ranks), {alone: a[alone]})[alone], together)


@pytest.mark.parametrize("ranks", [(8,) * 4, (8, 3, 5, 8)], ids=str)
def test_idle_experts_get_zeros_and_their_values_do_not_matter(ranks: tuple[int, ...]):
    """Nor does what lies beside A and B in a bigger buffer."""
    a = tensors(Case(T=20, routing="half", ranks=ranks))
    idle = sum(ranks[:2])
    for name, more in (("A", (0, 0, 0, 8)), ("B", (0, 8))):
        wide = torch.nn.functional.pad(a[name].detach(), more, value=torch.nan)
        a[name] = wide[: a[name].shape[0], : a[name].shape[1]].requires_grad_()
    a["ids"][3], a["ids"][4] = -1, len(ranks)
    with torch.no_grad():
        a["weights"][3:5] = torch.nan  # of empty slots
        a["A"][idle:], a["B"][:, idle:] = torch.nan, torch.inf
    y = mixed(a, ranks)
    assert torch.equal(y[3:5], a["base"][3:5])
    found = gradients(y, leaves_of(a))
    assert not found["A"][idle:].any()
    assert not found["B"][:, idle:].any()
    assert not found["weights"][3:5].any()
    assert not found["x"][3:5].any()
    assert found["A"][:idle].isfinite().all()
    assert found["A"][:idle].all()


def test_a_weight_of_zero_has_its_gradient_and_a_negative_one_counts(monkeypatch: pytest.MonkeyPatch):
    case = Case(T=12, ranks=(8, 8))
    a = tensors(case)
    with torch.no_grad():
        a["weights"][:6] = 0.0
        a["weights"][6:] = -1.5
    check(a, lambda: mixed(a, case.ranks), lambda: exact(a), monkeypatch)
    assert gradients(mixed(a, case.ranks), leaves_of(a))["weights"][:6].all()


def test_b_of_zero_leaves_the_base_bit_for_bit():
    case = Case(T=40, dtype=BF16)
    a = tensors(case)
    with torch.no_grad():
        a["B"].zero_()
    assert torch.equal(mixed(a, case.ranks), a["base"])


def test_order_of_tokens_and_names_of_experts_do_not_matter():
    case = Case(T=20)
    a = tensors(case)
    y, order = mixed(a, case.ranks), torch.randperm(20)
    moved = {n: a[n][order] if n in ("base", "x", "weights", "ids") else a[n] for n in a}
    same_rows(mixed(moved, case.ranks), y[order])
    places = torch.tensor([2, 0, 3, 1], device=DEVICE)  # expert e moves to place[e]
    rows = (places.argsort().unsqueeze(1) * 8 + torch.arange(8, device=DEVICE)).flatten()
    other = {**a, "ids": places[a["ids"]], "A": a["A"][rows], "B": a["B"][:, rows], "scale": a["scale"][rows]}
    same_rows(mixed(other, case.ranks), y)


def test_repeated_runs_and_repeated_backwards_are_bit_equal():
    case = Case(T=36, ranks=(8,) * 2)
    a = tensors(case)
    y = mixed(a, case.ranks)
    first = torch.autograd.grad(y.sum(), list(leaves_of(a).values()), retain_graph=True)
    assert torch.equal(mixed(a, case.ranks), y)
    again = torch.autograd.grad(y.sum(), list(leaves_of(a).values()), retain_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize(
    ("ranks", "ends"),
    [((8,) * 4, (5, 5, 20, 33)), ((3, 0, 7), (17, 20, 37)), ((8,) * 2, (0, 0)), ((4, 4), (30, 37))],
    ids=str,
)
def test_rows_that_lie_sorted_equal_float64(
    ranks: tuple[int, ...], ends: tuple[int, ...], with_base: bool, monkeypatch: pytest.MonkeyPatch
):
    a = tensors(Case(T=37, ranks=ranks, K=1))
    a["ids"] = torch.bucketize(torch.arange(37), torch.tensor(ends), right=True).to(DEVICE).unsqueeze(1)
    a["weights"] = torch.ones(37, 1, device=DEVICE)
    if not with_base:
        a["base"] = None
    how = {} if len(set(ranks)) == 1 else {k: v for k, v in described(a, ranks).items() if k != "scale_R"}

    def run() -> Tensor:
        end_E = torch.tensor(ends, dtype=torch.int32, device=DEVICE)
        return grouped_ops.grouped_lora(a["x"], a["A"], a["B"], end_E, a["scale"], a["base"], **how)

    zeros = torch.zeros(37, 33, device=DEVICE)
    check(a, run, lambda: exact(a if with_base else {**a, "base": zeros}), monkeypatch)
    past = slice(ends[-1], None)
    assert torch.equal(run()[past], (a["base"] if with_base else zeros)[past])


@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP16], ids=str)
@pytest.mark.parametrize("ranks", [(4,) * 40, (5, 0, 7), (130, 1)], ids=str)
def test_gathered_experts_equal_float64(ranks: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    a = tensors(Case(T=3, ranks=ranks, dtype=dtype, routing="dropped", I=1030, O=140, layout="slice"))
    a["weights"] = torch.where((a["ids"] >= 0) & (a["ids"] < len(ranks)), a["weights"], torch.nan).detach()
    given = [a[n].detach() for n in ("base", "x", "A", "B", "weights", "ids")]

    def run() -> Tensor:
        return grouped_ops.gather_mix(*given, **described(a, ranks))

    wanted, got = exact({**a, "weights": a["weights"].nan_to_num()}).detach(), run()
    monkeypatch.setattr(grouped_ops, "_steps", lambda x: grouped_eager)
    assert got.dtype == dtype
    assert distance(got, wanted) <= 2 * distance(run(), wanted) + FLOOR[dtype]
