"""Configs: exact to and from JSON, every fault named, nothing accepted that cannot be built and trained (F1 to F4)."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings

import molora
from molora.config import BalanceConfig, GateConfig, MoloraConfig, Placement, RouterConfig, per_layer
from molora.config.options import GateOptions
from molora.config.site import SiteConfig
from molora.config.strict import Strict, unwritten
from molora.errors import ConfigError, MoloraError
from molora.recipes import RECIPES
from molora.recipes.check import check
from molora.routers import BALANCES
from molora.surgery import resolve
from molora.surgery.trace import trace
from tests.support.places import ROOT
from tests.support.strategies import configs, junk, neighbours
from tests.support.tiny import adapters, base_model, batch, options

FEW = settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
# What a config cannot know of a model: its layers and its modules.
OF_THE_MODEL = re.compile(
    r"layers of|experts on layer|matches no linear|feed-forward block|also adapted|multiple of|ranks in all"
)


@pytest.fixture(autouse=True, scope="module")
def _one_trace() -> Iterator[None]:
    """The examples share one model, so its shape-only forward need not run for each."""
    record = trace(base_model("llama"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resolve, "trace", lambda model: record)
        yield


@FEW
@given(configs())
def test_round_trip(config: MoloraConfig):
    """F1: through real JSON text, equal in every field and type."""
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = MoloraConfig.from_dict(json.loads(text))
    assert again == config
    assert repr(again) == repr(config)
    assert json.dumps(again.to_dict()) == text


@settings(FEW, max_examples=200)
@given(configs())
def test_what_is_accepted_trains(config: MoloraConfig):
    """F3: conversion, one training step, unload; the model's own size is all that may still be wrong."""
    model = base_model("llama")
    try:
        molora.convert(model, config)
    except MoloraError as e:
        if not OF_THE_MODEL.search(str(e)):
            raise
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    model.train()
    loss = model(**batch("llama"), **({"task_ids": torch.tensor([0, -100])} if supervised(model) else {})).loss
    assert loss.isfinite()
    if loss.requires_grad:
        loss.backward()
        torch.optim.SGD(trained, lr=0.01).step()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained)
    with torch.no_grad():
        assert model.eval()(**batch("llama")).logits.isfinite().all()
    base, now = base_model("llama").state_dict(), model.unload().state_dict()
    assert base.keys() == now.keys()
    assert all(torch.equal(now[n], t) for n, t in base.items())


def supervised(model: Any) -> bool:
    return any(BALANCES[b.kind].needs_tasks for p in model._molora.config.placements for b in p.balance)


@settings(FEW, max_examples=150)
@given(neighbours())
def test_neighbours_of_good_configs_are_refused_or_train(raw: dict[str, Any]):
    """F3 at the borders: combinations that no recipe makes."""
    try:
        config = MoloraConfig.from_dict(raw)
        check(config)
    except ConfigError:
        event("refused")
        return
    event("accepted")
    test_what_is_accepted_trains.hypothesis.inner_test(config)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to every entry of nested dicts and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [p for k, v in items for p in ((*path, k), *places(v, (*path, k)))]


@settings(FEW, max_examples=150)
@given(configs(), st.data())
def test_mutations_are_config_errors(config: MoloraConfig, data: st.DataObject):
    """F2: any entry replaced, removed or added: a config or a ConfigError, never another exception."""
    raw = config.to_dict()
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from(places(raw)))
        parent = raw
        for key in where[:-1]:
            parent = parent[key]
        how = data.draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if how == "replace":
            parent[where[-1]] = copy.copy(data.draw(junk))
        elif how == "remove":
            del parent[where[-1]]
        elif isinstance(parent, dict):
            parent[data.draw(st.sampled_from(("zzz", 7, None)))] = 1
    message = ""
    try:
        assert MoloraConfig.from_dict(raw).to_dict()
    except ConfigError as e:
        message = str(e)
    assert len(message) < 20_000


@settings(FEW, max_examples=300)
@given(st.data())
def test_junk_options_are_config_errors(root: Path, data: st.DataObject):
    recipe = data.draw(st.sampled_from(list(RECIPES)))
    names = list(inspect.signature(RECIPES[recipe]).parameters)
    chosen = data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    given_options = {n: data.draw(junk) for n in chosen}
    try:
        config = RECIPES[recipe](**{**options(recipe, "llama", root), **given_options})
    except ConfigError:
        return
    assert MoloraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_fault_is_named():
    raw = molora.recipes.mixlora().to_dict()
    raw["nonsense"], raw["kernel"], raw["layers_to_transform"] = 1, 5, [-2]
    first = raw["placements"][0]
    first |= {"r": 0, "lora_dropout": 1.5, "select": "some", "zzz": None}
    first["gate"] |= {"top_k": "two", "temperature": -1.0}
    del raw["recipe"]
    with pytest.raises(ConfigError) as e:
        MoloraConfig.from_dict(raw)
    for name in ("nonsense", "kernel", "layers_to_transform", "'zzz'", "r:", "lora_dropout", "select", "top_k"):
        assert name in str(e.value)
    assert "temperature" in str(e.value)
    assert "recipe: missing" in str(e.value)


def test_every_wrong_option_is_named():
    with pytest.raises(ConfigError) as e:
        molora.recipes.mixlora(r="eight", lora_alpha=None, top_kk=2)
    assert all(n in str(e.value) for n in ("r: got 'eight'", "lora_alpha: got None", "did you mean 'top_k'"))
    with pytest.raises(ConfigError) as e:
        molora.recipes.mixlora(r=0, lora_dropout=1.0, num_experts=4, top_k=5, jitter=2.0, init_noise=-1.0)
    for name in ("r: got 0", "lora_dropout: got 1.0", "top_k: got 5 with 4", "jitter: got 2.0", "init_noise: got -1.0"):
        assert name in str(e.value)


@pytest.mark.parametrize("cls", [GateConfig, RouterConfig, BalanceConfig, Placement])
@pytest.mark.parametrize("value", [None, 3, "x", [], [1]])
def test_from_dict_wants_an_object(cls: Any, value: Any):
    with pytest.raises(ConfigError, match="expected an object"):
        cls.from_dict(value)


def test_configs_are_frozen_and_hashable():
    config = molora.recipes.mola()
    with pytest.raises(AttributeError):
        config.kernel = "loop"  # type: ignore[misc]
    assert hash(config) == hash(molora.recipes.mola())
    assert config.replace(kernel="loop").kernel == "loop"
    with pytest.raises(ConfigError, match="kernel"):
        config.replace(kernel=3)


@pytest.mark.parametrize(
    ("value", "layers", "expected"),
    [
        (3, 4, [3, 3, 3, 3]),
        ((2, 4, 6, 8), 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ((2, 4, 6, 8), 2, [2, 6]),
        ((1, 2), 3, [1, 1, 2]),
        ((1, 2, 3), 4, [1, 1, 2, 3]),
    ],
)
def test_per_layer(value: Any, layers: int, expected: list[int]):
    assert [per_layer(value, i, layers) for i in range(layers)] == expected
    assert per_layer(value, None, layers) == (value if isinstance(value, int) else value[-1])


def test_a_site_from_a_file_cannot_ask_for_the_impossible():
    own = {"path": "a.b", "placement": 0, "in_features": 8, "out_features": 8}
    for ranks, experts in (((10**9,), 2), ((2,), 10**9), ((2, 2, 2), 2), ((-1,), 2)):
        with pytest.raises(ConfigError):
            SiteConfig(**own, num_experts=experts, ranks=ranks, scales=(1.0,))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_is_documented(recipe: str, root: Path):
    """F4: a paper, keyword-only options with annotations, its own name in the config, a row in the README."""
    function = RECIPES[recipe]
    assert re.search(r"arXiv \d{4}\.\d{4,5}", function.__doc__ or "")
    assert "y = " in function.__doc__
    assert function.__name__ == recipe
    assert getattr(molora.recipes, recipe) is function
    for p in inspect.signature(function).parameters.values():
        assert p.kind is inspect.Parameter.KEYWORD_ONLY
        assert p.default is not inspect.Parameter.empty
    own = {"adapters": adapters(root, "llama")} if "adapters" in inspect.signature(function).parameters else {}
    assert function(**own).recipe == recipe
    readme = (ROOT / "README.md").read_text()
    assert re.search(rf"^\|.*`{recipe}`", readme, re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Newer(Strict):
    """A config that got a field after files of it were written."""

    old: int = 1
    new: str = unwritten("as before")


def test_a_field_that_came_later_is_not_written_at_its_default() -> None:
    assert Newer().to_dict() == {"old": 1}
    assert Newer(new="other").to_dict() == {"old": 1, "new": "other"}
    assert Newer.from_dict({"old": 1}) == Newer()
    assert Newer.from_dict(Newer(new="other").to_dict()).new == "other"


def test_options_of_a_kind_of_its_own_are_read_as_its_class() -> None:
    """All other kinds share the class of before, whose JSON is as it was."""

    @dataclass(frozen=True, kw_only=True)
    class Threshold(GateOptions):
        kind: str = "threshold of a test"
        above: float = 0.5

    gate = Threshold(above=0.25)
    placement = Placement(gate=gate)
    assert placement.to_dict()["gate"] == {
        "kind": "threshold of a test", "top_k": None, "partition": 1, "jitter": 0.0, "above": 0.25
    }  # fmt: skip
    assert Placement.from_dict(placement.to_dict()).gate == gate
    assert type(Placement.from_dict(Placement().to_dict()).gate) is GateConfig
    assert "kind" not in Placement().to_dict()["gate"]
    with pytest.raises(ConfigError, match="unknown entry 'above'"):
        GateOptions.from_dict({"above": 0.25})
