"""Lesions: which experts are taken away, and that taking one away leaves the rest of the model as it is."""

from __future__ import annotations

import pytest
import torch

from molora.eval.ablation.lesions import favourites, silenced
from molora.eval.counting.counter import routed_sites
from molora.layers.linear import MixtureLinear
from molora.surgery.install import sites_of
from tests.support import behaviours, tiny
from tests.support.traits import having


@pytest.mark.parametrize("recipe", having(lambda t: t.routes))
def test_a_silenced_expert_is_nothing_where_its_router_feeds_it_and_comes_back(recipe: str) -> None:
    model, inputs = behaviours.armed(recipe, "llama"), tiny.batch("llama", labels=False)
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, tiny.output(model, inputs)
    router = routed_sites(model)[0]
    block = next(m.site.block for _, m in sites_of(model).values() if m.site.path == router.path)
    with silenced(model, {router.path: 1}):
        found = tiny.output(model, inputs)
        changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.endswith("lora_B") and k.startswith(router.path.rpartition(".")[0]) for k in changed)
    assert not torch.allclose(found, plain, atol=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        for m in (m for m in model.modules() if isinstance(m, MixtureLinear) and m.bank is not None):
            if m.site.path == router.path or m.site.block == block != "":
                m.bank.expert(1)[1].zero_()
    assert torch.equal(found, tiny.output(model, inputs))


def test_a_favourite_has_the_highest_lift_and_of_equals_the_first() -> None:
    picks = {"a": [30.0, 5, 5, 0], "b": [60.0, 0, 0, 20], "c": [0.0, 0, 0, 0]}
    assert favourites(picks) == {"a": 1, "b": 3, "c": None}
