"""Properties of the gate functions for any logits, and routers in float32 whatever runs around them (B8, B9)."""

from __future__ import annotations

from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import molora
from molora.config import GateConfig
from molora.routers.gates import gate
from molora.routing import Routing, dense_weights
from tests.support.tiny import arm, base_model, batch, converted, options
from tests.support.tolerances import close

EXTREMES = [0.0, 1.0, -1.0, 1e-30, 1e30, -1e30, 30.0, 30.0, -1e4]
numbers = st.one_of(st.sampled_from(EXTREMES), st.floats(-50, 50, width=32))


@st.composite
def logits(draw: st.DrawFn) -> Tensor:
    """(T, E) with ties, huge values and at most E - 1 columns of -inf."""
    T, E = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    out = torch.tensor(draw(st.lists(st.lists(numbers, min_size=E, max_size=E), min_size=T, max_size=T)))
    out[:, draw(st.integers(1, E)) :] = float("-inf")
    return out


def check(r: Routing, T: int, E: int, K: int, *, nonnegative: bool = True) -> None:
    assert r.weights.dtype == r.probs.dtype == r.logits.dtype == torch.float32
    assert r.weights.shape == (T, K)
    assert r.probs.shape == (T, E)
    assert r.weights.isfinite().all()
    if nonnegative:
        assert (r.weights >= 0).all()
    if r.ids is not None:
        assert r.ids.dtype == torch.int64
        assert ((r.ids >= 0) & (r.ids < E)).all()
        assert all(len(set(row)) == K for row in r.ids.tolist())
        spread = r.dense()
        close(spread.sum(-1), r.weights.sum(-1), "same_math_fp32")
        assert torch.equal((r.slots() * r.weights.unsqueeze(-1)).sum(1), spread)


@settings(max_examples=150, deadline=None)
@given(logits(), st.data())
def test_renormalised_weights_sum_to_one(x: Tensor, data: st.DataObject):
    T, E = x.shape
    K = data.draw(st.integers(1, E))
    r = gate(x, GateConfig(top_k=K, renormalize="one"), K)
    check(r, T, E, K)
    close(r.weights.sum(-1), torch.ones(T), "same_math_fp32")
    picked = r.probs.gather(1, r.ids)
    rest = r.probs.scatter(1, r.ids, -1.0).max(-1).values
    assert (picked.min(-1).values >= rest).all(), "a larger probability was left out"


@settings(max_examples=100, deadline=None)
@given(logits(), st.data())
def test_other_modes(x: Tensor, data: st.DataObject):
    T, E = x.shape
    K = data.draw(st.integers(1, E))
    check(gate(x, GateConfig(top_k=K), K), T, E, K)
    total = gate(x, GateConfig(activation="sigmoid", top_k=K, renormalize="top_k"), K)
    check(total, T, E, K)
    alive = (total.weights > 0).any(-1)
    close(total.weights.sum(-1)[alive], torch.full((int(alive.sum()),), float(K)), "same_math_fp32")
    dense = gate(x, GateConfig(), None)
    assert dense.ids is None
    check(dense, T, E, E)


@settings(max_examples=100, deadline=None)
@given(logits(), st.floats(0.01, 1.0))
def test_nucleus(x: Tensor, top_p: float):
    r = gate(x, GateConfig(top_p=top_p), None)
    assert r.ids is not None
    for weights, ids, probs in zip(r.weights, r.ids, r.probs, strict=True):
        kept = [i for i in ids.tolist() if i >= 0]
        assert kept
        assert len(set(kept)) == len(kept)
        assert weights[ids < 0].sum() == 0
        without_last = probs[kept].sum() - probs[kept[-1]]
        assert without_last < top_p + 1e-6


def test_ties_go_to_the_lower_index():
    r = gate(torch.zeros(3, 5), GateConfig(top_k=2), 2)
    assert r.ids.tolist() == [[0, 1]] * 3


def test_capacity_counts_per_sequence():
    logits_TE = torch.tensor([[5.0, 0], [5, 0], [0, 5], [5, 0]]).repeat(2, 1)
    r = gate(logits_TE, GateConfig(top_k=1, capacity=2), 1, rows=2)
    assert r.ids.flatten().tolist() == [0, 0, 1, -1] * 2
    assert r.weights[r.ids < 0].tolist() == [0.0, 0.0]
    whole = gate(logits_TE, GateConfig(top_k=1, capacity=2), 1)
    assert whole.ids.flatten().tolist() == [0, 0, 1, -1, -1, -1, 1, -1]


def test_spread_of_empty_slots():
    weights, ids = torch.tensor([[0.5, 0.0], [0.25, 0.75]]), torch.tensor([[1, -1], [2, 0]])
    assert dense_weights(weights, ids, 3).tolist() == [[0, 0.5, 0], [0.75, 0, 0.25]]


@pytest.mark.parametrize("recipe", ["mola", "mixlora", "llava_mole", "smora", "meteora", "xlora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_routers_run_in_float32(recipe: str, dtype: torch.dtype, root: Path):
    """B9: under autocast and on a half base, choices equal those that float32 arithmetic makes of the same input."""
    model = arm(molora.convert(base_model("llama").to(dtype), recipe, **options(recipe, "llama", root)))
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    seen: dict[str, Tensor] = {}
    routers = {n: m for n, m in model.named_modules() if n.endswith("router")}
    hooks = [m.register_forward_hook(lambda m, a, y, n=n: seen.update({n: (a[0], y)})) for n, m in routers.items()]
    for around in (False, True):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=around):
            model(**inputs)
        assert seen.keys() == {n for n in routers if routers[n].state_dict()}
        for name, (x, y) in seen.items():
            assert all(p.dtype == torch.float32 for p in routers[name].parameters())
            assert y.dtype == torch.float32
            with torch.no_grad():
                assert torch.equal(y, type(routers[name]).forward(routers[name], x.float()))
    for h in hooks:
        h.remove()


def test_gate_is_computed_in_float32_for_any_logits():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        r = gate(torch.randn(4, 6).to(dtype), GateConfig(top_k=2, renormalize="one"), 2)
        assert {r.weights.dtype, r.probs.dtype, r.logits.dtype} == {torch.float32}


def test_unarmed_router_does_not_collapse(root: Path):
    """A zero router would tie every token to the same experts; a fresh one must not."""
    for recipe in ("mola", "mixlora", "llava_mole", "smora"):
        model = converted(recipe, "llama", root, armed=False)
        with molora.record_routing(model) as tape, torch.no_grad():
            model(**batch("llama", rows=4, labels=False))
        routed = [records for records in tape.values() if records[0].ids is not None]
        assert routed
        for records in routed:
            assert len(records[0].ids[:, 0].unique()) > 1
