"""The rank-concat kernels against float64: value and every gradient, over shapes, routings, layouts and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from molora.kernels import functional
from molora.kernels import tiles as configs
from tests.kernels.interpreted.cases import (
    DEVICE,
    Case,
    check,
    exact,
    gates_TR,
    gradients,
    leaves_of,
    same_rows,
    tensors,
)

HALF = (torch.float16, torch.bfloat16)
CASES = {
    "no_tokens": Case(T=0),
    "one_token": Case(T=1, ranks=(16,) * 8),
    "two_tokens_of_many_ranks": Case(T=2, ranks=(64,) * 8, I=64, O=40),
    "a_row_short_of_a_tile": Case(T=15),
    "a_tile": Case(T=16, I=128, O=128, ranks=(16,) * 8),
    "a_row_over_a_tile": Case(T=17, ranks=(4,), K=1),
    "unequal_ranks": Case(T=37, ranks=(5, 3, 7), I=97, K=3),
    "a_rank_of_nothing": Case(T=9, ranks=(4, 0, 2)),
    "every_rank_an_expert": Case(T=37, ranks=(1,) * 64, K=8, O=97),
    "all_experts": Case(T=20, ranks=(8,) * 4, form="dense"),
    "all_experts_of_many_ranks": Case(T=20, ranks=(64,) * 5, form="dense", I=64, O=64),
    "always_on": Case(T=20, ranks=(8,), form="always"),
    "always_on_of_many_ranks": Case(T=20, ranks=(200,), form="always"),
    "rows_of_a_large_tile": Case(T=129, I=200, O=200),
    "many_rows": Case(T=1000, I=64, O=64, ranks=(8,) * 4),
    "all_to_one": Case(routing="one"),
    "idle_experts": Case(T=40, routing="half", ranks=(8,) * 8),
    "dropped_tokens": Case(T=40, routing="dropped", K=3),
    "an_expert_twice": Case(T=20, routing="same"),
    "every_expert_chosen": Case(T=20, K=4),
    "sliced": Case(layout="slice"),
    "transposed": Case(layout="transposed"),
    "float32_params": Case(T=33, dtype=torch.bfloat16, param_dtype=torch.float32),
    **{
        f"{str(d)[6:]}_{n}": Case(T=37, dtype=d, I=128, O=64, ranks=r)
        for d in HALF
        for n, r in (("few", (8,) * 4), ("many", (32,) * 6))
    },
    **{f"{str(d)[6:]}_dense": Case(T=130, dtype=d, form="dense") for d in HALF},
}


def mixed(a: dict[str, Any]) -> Tensor:
    maps = {"expert_R": a["expert"], "scale_R": a["scale"]}
    return functional.rank_mix(a["base"], a["x"], a["A"], a["B"], a["weights"], a["ids"], **maps)


@pytest.fixture(params=[264, 1], ids=["split", "whole"])
def programs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU to keep busy with parts of sums, and one where each program takes all of a sum and many rows."""
    monkeypatch.setattr(configs, "PROGRAMS", request.param)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("name", CASES)
def test_equals_float64(name: str):
    check(tensors(CASES[name]), mixed, exact)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.builds(
        Case,
        T=st.integers(0, 70),
        I=st.integers(1, 150),
        O=st.integers(1, 150),
        ranks=st.lists(st.integers(0, 40), min_size=2, max_size=9).map(tuple).filter(any),
        K=st.integers(1, 2),
        form=st.sampled_from(["top_k", "dense", "always"]),
        routing=st.sampled_from(["uniform", "one", "dropped", "same", "half"]),
        layout=st.sampled_from(["plain", "slice", "transposed"]),
        dtype=st.just(torch.float32),
        param_dtype=st.none(),
    )
)
def test_any_shape_equals_float64(case: Case):
    check(tensors(case), mixed, exact)


@pytest.mark.parametrize("alone", ["base", "x", "A", "B", "weights"])
def test_each_gradient_alone_is_the_same(alone: str):
    """Frozen experts, or a frozen input, change no other gradient by a bit."""
    a = tensors(Case(T=20))
    together = gradients(mixed(a), leaves_of(a))[alone]
    for name, t in leaves_of(a).items():
        t.requires_grad_(name == alone)
    assert torch.equal(gradients(mixed(a), {alone: a[alone]})[alone], together)


def test_idle_experts_get_exact_zeros_and_dropped_rows_the_base():
    case = Case(T=20, routing="half", ranks=(8,) * 4)
    a = tensors(case)
    a["ids"][3] = -1
    a["ids"][4] = len(case.ranks)
    with torch.no_grad():
        a["weights"][3] = torch.nan  # of an empty slot: counts nothing
    y = mixed(a)
    assert torch.equal(y[3:5], a["base"][3:5])
    found = gradients(y, leaves_of(a))
    assert not found["A"][16:].any()
    assert not found["B"][:, 16:].any()
    assert not found["weights"][3:5].any()
    assert found["A"][:16].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_b_of_zero_leaves_the_base_bit_for_bit(dtype: torch.dtype):
    a = tensors(Case(T=40, dtype=dtype))
    with torch.no_grad():
        a["B"].zero_()
    assert torch.equal(mixed(a), a["base"])


def test_order_of_tokens_and_names_of_experts_do_not_matter():
    a = tensors(Case(T=40))
    y, order = mixed(a), torch.randperm(40)
    moved = {n: a[n][order] if n in ("base", "x", "weights", "ids") else a[n] for n in a}
    same_rows(mixed(moved), y[order])
    renamed = torch.tensor([2, 0, 3, 1], device=DEVICE)
    other = {**a, "ids": renamed[a["ids"]], "expert": renamed[a["expert"]]}
    assert torch.equal(mixed(other), y)


def test_repeated_runs_and_repeated_backwards_are_bit_equal():
    a = tensors(Case(T=200, I=128))
    y = mixed(a)
    first = torch.autograd.grad(y.sum(), list(leaves_of(a).values()), retain_graph=True)
    for _ in range(3):
        assert torch.equal(mixed(a), y)
        again = torch.autograd.grad(y.sum(), list(leaves_of(a).values()), retain_graph=True)
        assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_linears_of_one_input_equal_float64(count: int):
    """Base and experts in one operator; several linears share the products with x."""
    each = [tensors(Case(T=37, O=o, ranks=r, form=f), seed=s) for s, (o, r, f) in enumerate(LINEARS[:count])]
    x = each[0]["x"]
    W = [torch.randn(o, 40, device=DEVICE) / 6 for o, _, _ in LINEARS[:count]]
    bias = [torch.randn(o, device=DEVICE) if i != 1 else None for i, (o, _, _) in enumerate(LINEARS[:count])]
    leaves = {"x": x} | {f"{n}{i}": a[n] for i, a in enumerate(each) for n in ("A", "B", "weights") if a[n] is not None}

    def run(_: Any) -> Tensor:
        lists = {n: [a[n] for a in each] for n in ("A", "B", "weights", "ids", "expert", "scale")}
        maps = {"expert_R": lists.pop("expert"), "scale_R": lists.pop("scale")}
        return torch.cat(functional.rank_mix_linears(x, W, bias, *lists.values(), **maps), 1)

    def answer(_: Any) -> Tensor:
        ys = []
        for a, w, b in zip(each, W, bias, strict=True):
            g = gates_TR(a["weights"], a["ids"], a["expert"], a["scale"], 37)
            y = x.double() @ w.double().t() + (x.double() @ a["A"].double().t() * g) @ a["B"].double().t()
            ys.append(y if b is None else y + b)
        return torch.cat(ys, 1)

    check(leaves, run, answer)


LINEARS = ((33, (8,) * 4, "top_k"), (64, (5, 3, 7), "dense"), (20, (4,), "always"))


@pytest.mark.parametrize("ranks", [(8,) * 4, (5, 3, 7), (64,) * 5], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "dropped"])
def test_slots_equal_float64(ranks: tuple[int, ...], routing: str):
    """Out to a row per chosen expert, and back to one per token with the weights."""
    case = Case(T=21, ranks=ranks, routing=routing)
    a = tensors(case)
    maps = {"expert_R": a["expert"], "scale_R": a["scale"]}
    chosen_TKR = (a["ids"].unsqueeze(-1) == a["expert"]) * a["scale"].double()
    check(
        {n: a[n] for n in ("base", "x", "A", "B")},
        lambda p: functional.expand_slots(p["base"], p["x"], p["A"], p["B"], a["ids"], **maps),
        lambda p: (
            p["base"].double().unsqueeze(1)
            + (p["x"].double() @ p["A"].double().t()).unsqueeze(1) * chosen_TKR @ p["B"].double().t()
        ),
    )
    h = torch.randn(21, 2, case.I, device=DEVICE).requires_grad_()
    check(
        {"base": a["base"], "h": h, "weights": a["weights"], "A": a["A"], "B": a["B"]},
        lambda p: functional.contract_slots(p["base"], p["h"], p["weights"], p["A"], p["B"], a["ids"], **maps),
        lambda p: (
            p["base"].double()
            + (p["h"].double() @ p["A"].double().t() * chosen_TKR * p["weights"].double().unsqueeze(-1)).sum(1)
            @ p["B"].double().t()
        ),
    )
