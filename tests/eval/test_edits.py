"""Edits of a routing, whatever its form: what stays, what changes, and that padding is left alone."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from molora.config import GateConfig
from molora.eval.ablation.edits import GATES, Scene, random, shuffled, top_1, uniform
from molora.routers.gates import gate
from molora.routing import Routing
from tests.support.edited import without
from tests.support.tolerances import close

T, E, ROWS = 40, 6, 4
FORMS = {
    "top_1": (GateConfig(top_k=1), 1),
    "top_2": (GateConfig(top_k=2, renormalize="one"), 2),
    "all": (GateConfig(top_k=6, renormalize="one"), 6),
    "dense": (GateConfig(), None),
    "any_sign": (GateConfig(activation="identity"), None),
    "top_p": (GateConfig(top_p=0.5), None),
    "capacity": (GateConfig(top_k=1, capacity=2), 1),
    "sigmoid": (GateConfig(activation="sigmoid", top_k=3, renormalize="top_k"), 3),
}
forms = pytest.mark.parametrize("form", FORMS)
VALID = torch.ones(ROWS, T // ROWS, dtype=torch.bool)
VALID[1, 4:] = VALID[3, 8:] = False
VALID_T = VALID.flatten()
EVERY = {**GATES, "without": functools.partial(without, expert=2)}


def routing(form: str, tokens: int = T) -> Routing:
    logits_TE = 2 * torch.randn(tokens, E, generator=torch.Generator().manual_seed(3))
    config, top_k = FORMS[form]
    return gate(logits_TE, config, top_k, rows=ROWS)


def scene(valid_T: Tensor = VALID_T, batch: str = "0", site: str = "a") -> Scene:
    return Scene(valid_T, torch.arange(E) / 10, batch, site)


def test_the_forms_are_what_they_are_called() -> None:
    assert (routing("capacity").slot_ids() < 0).any()
    assert (routing("top_p").slot_ids() < 0).any()
    assert (routing("any_sign").weights < 0).any()


@forms
@pytest.mark.parametrize("name", EVERY)
def test_padding_and_the_routers_opinion_stay(name: str, form: str) -> None:
    before = routing(form)
    kept = [before.weights.clone(), before.slot_ids().clone()]
    after = EVERY[name](before, scene())
    assert torch.equal(after.dense()[~VALID_T], before.dense()[~VALID_T])
    assert torch.equal(after.probs, before.probs)
    assert (after.ids is None) == (before.ids is None)
    assert after.weights.shape == after.slot_ids().shape
    assert not after.weights[after.slot_ids() < 0].any(), "an empty slot has no weight"
    assert torch.equal(before.weights, kept[0])
    assert torch.equal(before.slot_ids(), kept[1]), "the router's own routing is not written to"


@forms
def test_uniform_spreads_each_tokens_total(form: str) -> None:
    before, after = routing(form), uniform(routing(form), scene())
    share_T1 = before.weights.sum(1, keepdim=True) / E
    close(after.dense()[VALID_T], share_T1.expand(-1, E)[VALID_T], "formula")


@forms
def test_shuffled_deals_the_rows_out_anew(form: str) -> None:
    before, after = routing(form).dense(), shuffled(routing(form), scene()).dense()
    rows = [sorted(d[VALID_T].tolist()) for d in (before, after)]
    assert rows[0] == rows[1]
    assert not torch.equal(before, after)
    elsewhere = shuffled(routing(form), scene(site="b")).dense()
    assert torch.equal(elsewhere, after), "a token takes over one other token's routing at every router"
    assert not torch.equal(shuffled(routing(form), scene(batch="1")).dense(), after)


@forms
def test_random_keeps_each_tokens_weights(form: str) -> None:
    before, after = routing(form), random(routing(form), scene())
    assert torch.equal(after.weights.sort().values, before.weights.sort().values)
    assert torch.equal(after.slot_ids() < 0, before.slot_ids() < 0)
    for ids in after.slot_ids()[VALID_T].tolist():
        chosen = [e for e in ids if e >= 0]
        assert len(set(chosen)) == len(chosen)
    assert not torch.equal(after.dense(), before.dense())
    assert not torch.equal(random(routing(form), scene(site="b")).dense(), after.dense())
    assert torch.equal(random(routing(form), scene()).dense(), after.dense())


@pytest.mark.parametrize("form", ["top_1", "top_2", "dense"])
def test_random_favours_nobody(form: str) -> None:
    many = routing(form, 6000)
    mean_E = random(many, scene(torch.ones(6000, dtype=torch.bool))).dense().mean(0)
    assert (mean_E * E / many.weights.sum(1).mean() - 1).abs().max() < 0.1


@forms
def test_top_1_is_the_heaviest_with_everything(form: str) -> None:
    before, after = routing(form), top_1(routing(form), scene())
    for t in VALID_T.nonzero().flatten().tolist():
        old, new = before.dense()[t], after.dense()[t]
        assert int((new != 0).sum()) <= 1
        close(new.sum(), old.sum(), "same_math_fp32")
        if new.any():
            assert int(new.abs().argmax()) == int(old.abs().argmax())
    if FORMS[form][1] == 1:
        assert torch.equal(after.weights, before.weights)
        assert torch.equal(after.slot_ids(), before.slot_ids())


@forms
def test_frozen_is_one_gate_for_all(form: str) -> None:
    after = GATES["frozen"](routing(form), scene()).dense()
    close(after[VALID_T], (torch.arange(E) / 10).expand(int(VALID_T.sum()), E), "formula")


@forms
@pytest.mark.parametrize("expert", range(E))
def test_a_lesion_takes_one_expert_and_renormalises_nothing(expert: int, form: str) -> None:
    before, after = routing(form).dense(), without(routing(form), scene(), expert=expert).dense()
    wanted = before.clone()
    wanted[VALID_T, expert] = 0
    assert torch.equal(after, wanted)
