"""Editing the routing of a running model: every kernel uses what the editor returns, and nothing stays of it."""

from __future__ import annotations

import functools
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora import context
from molora.errors import ConfigError, MoloraError
from molora.eval.ablation.edits import GATES, Edit, Scene, shuffled, top_1, uniform
from molora.eval.counting.counter import routed_sites
from molora.layers.banks.plain import ExpertBank
from molora.layers.ffn import FFNRows
from molora.layers.linear import MixtureLinear
from molora.routers import LinearRouter
from molora.routing import Routing
from tests.layers.test_ffn import KINDS, by_hand, toy
from tests.support import behaviours, tiny
from tests.support.edited import MIXTURES, VARIANTS, equal_experts, everywhere, under, without
from tests.support.recorded import padded
from tests.support.tolerances import close
from tests.support.traits import having, traits

PAIRS = behaviours.over([(r, n) for r, n in behaviours.PAIRS if r in MIXTURES])
variants = pytest.mark.parametrize("variant", VARIANTS)
mixtures = pytest.mark.parametrize("recipe", MIXTURES)
EVERY: dict[str, Edit] = {**GATES, "without": functools.partial(without, expert=1)}


@PAIRS
def test_uniform_on_equal_experts_changes_nothing(recipe: str, name: str, tmp_path: Path) -> None:
    model, inputs = equal_experts(recipe, name, tmp_path), padded(name)
    close(under(uniform, model, inputs), tiny.output(model, inputs), "same_math_fp32")


@variants
def test_uniform_on_equal_experts_changes_nothing_in_any_form(variant: str, tmp_path: Path) -> None:
    """Nor do other experts of the same weights; the edits do change mixtures whose experts differ."""
    recipe, more = VARIANTS[variant]
    model, inputs = equal_experts(recipe, "llama", tmp_path, **more), padded("llama")
    plain = tiny.output(model, inputs)
    for name in ("uniform", "random", "top-1"):
        close(under(GATES[name], model, inputs), plain, "same_math_fp32")
    model = behaviours.armed(recipe, "llama", **more)
    plain = tiny.output(model, inputs)
    same = [name for name, edit in EVERY.items() if torch.allclose(under(edit, model, inputs), plain, atol=1e-3)]
    assert same == (["top-1"] if traits(model).picks_one else [])


BY_LINEAR = having(lambda t: t.routes and not t.mixes_blocks)


@behaviours.over([(r, n) for r in BY_LINEAR for n in ("llama", "gpt2", "t5") if (r, n) in behaviours.PAIRS])
def test_a_lesion_of_a_linears_expert_is_its_B_at_zero(recipe: str, name: str) -> None:
    model, inputs = behaviours.armed(recipe, name), padded(name)
    inputs.pop("attention_mask")  # every token is real, as for the B that is zeroed
    got = under(EVERY["without"], model, inputs)
    assert not torch.allclose(got, tiny.output(model, inputs), atol=1e-3)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MixtureLinear) and m.bank is not None and m.site.num_experts > 1:
                m.bank.expert(1)[1].zero_()
    close(got, tiny.output(model, inputs), "same_math_fp32")


ROUTES: dict[str, dict[str, Any]] = {
    "k2": {},
    "top_p": {"routing": "top_p", "top_p": 0.6},
    "capacity": {"routing": "switch", "expert_capacity": 3},
}


@pytest.mark.parametrize("edit", EVERY)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KINDS)
def test_a_block_mixes_the_edited_experts(name: str, route: str, edit: str) -> None:
    """``sum_k w_k FFN_k(x)`` with the weights that a tape sees, and the down bias as often as they add up to."""
    path, act = KINDS[name]
    model, inputs = behaviours.armed("mixlora", name, **ROUTES[route]), padded(name)
    block, seen = model.get_submodule(path), []
    sites = [m for m in block.modules() if isinstance(m, MixtureLinear)]
    if name == "gpt2":
        with torch.no_grad():
            sites[-1].base_layer.bias.normal_(generator=torch.Generator().manual_seed(1))
    handle = block.register_forward_hook(lambda _, args, y: seen.append((args[0].flatten(0, 1), y.flatten(0, 1))))
    with molora.record_routing(model) as tape:
        under(EVERY[edit], model, inputs)
    handle.remove()
    ((x, y),) = seen
    with torch.no_grad():
        close(y, by_hand(sites, act, x, tape[sites[0].site.path][0]), "same_math_fp32")


@pytest.mark.parametrize("edit", EVERY)
def test_rows_of_a_block_that_runs_once_a_choice(edit: str) -> None:
    """A block without a slot axis computes what one with it does, with as many rows as the edited routing has slots."""
    models = [tiny.arm(molora.convert(toy(m), "mixlora", r=4, num_experts=4)) for m in ("plain", "sized")]
    assert any(isinstance(m, FFNRows) for m in models[1].modules())
    for kind in (ExpertBank, LinearRouter):
        own = [[m for m in model.modules() if isinstance(m, kind)] for model in models]
        for a, b in zip(*own, strict=True):
            b.load_state_dict(a.state_dict())
    outputs = []
    for model in models:  # whose sites have other names
        with everywhere(lambda r, s: EVERY[edit](r, s._replace(site="")), model), torch.no_grad():
            outputs.append(model(torch.arange(10).view(2, 5)))
    close(outputs[1], outputs[0], "same_math_fp32")
    with torch.no_grad():
        assert not torch.allclose(outputs[0], models[0](torch.arange(10).view(2, 5)), atol=1e-3)


@mixtures
@pytest.mark.parametrize("edit", EVERY)
def test_every_kernel_takes_every_edit(edit: str, recipe: str) -> None:
    inputs = padded("llama")
    wanted = under(EVERY[edit], behaviours.shared(recipe, "llama"), inputs)
    for kernel in ("loop", "sorted", "gather") if traits(recipe).picks_everywhere else ("loop",):
        close(under(EVERY[edit], behaviours.armed(recipe, "llama", kernel=kernel), inputs), wanted, "same_math_fp32")


@PAIRS
def test_one_call_a_decision_and_none_for_the_scaling_pass(recipe: str, name: str) -> None:
    model, inputs, calls = behaviours.shared(recipe, name), padded(name), []

    def editor(site: str, routing: Routing, valid_BS: Tensor) -> Routing:
        calls.append((site, tuple(valid_BS.shape), int(valid_BS.sum())))
        return shuffled(routing, Scene(valid_BS.reshape(-1), torch.zeros(0), "", site))

    with molora.record_routing(model) as tape, context.editing(model._molora.owner, editor):
        tiny.output(model, inputs)
    chosen = {s.path for s in routed_sites(model)}
    assert sorted(site for site, _, _ in calls if site in chosen) == sorted(chosen)
    for site, shape, real in calls:
        (record,) = tape[site]
        assert (record.rows, int(record.valid.sum())) == (shape[0], real)


def test_routers_of_both_kinds_are_edited_once(tmp_path: Path) -> None:
    """Blocks with routers of their own beside a model-wide one: in its scaling pass their routing is left alone."""
    whole = molora.recipes.xlora(adapters=tiny.adapters(tmp_path, "llama"), xlora_depth=1, scaling_pass_value=0.5)
    blocks = molora.recipes.llava_mole(r=4, num_experts=4).placements[0]
    config = whole.replace(placements=(blocks, whole.placements[0].replace(select="rest")))
    model, calls = tiny.arm(molora.convert(tiny.base_model("llama"), config)).eval(), []

    def editor(site: str, routing: Routing, valid_BS: Tensor) -> Routing:
        calls.append(site)
        return routing

    with context.editing(model._molora.owner, editor):
        tiny.output(model, padded("llama"))
    assert sorted(calls) == sorted(s.path for s in routed_sites(model))


@mixtures
def test_shuffling_keeps_the_loads(recipe: str) -> None:
    """At the first router, whose input does not depend on any routing; a model-wide one's gates come from the base."""
    model, inputs = behaviours.shared(recipe, "llama"), padded("llama")
    with molora.record_routing(model) as plain:
        tiny.output(model, inputs)
    with molora.record_routing(model) as edited:
        under(shuffled, model, inputs)
    site = routed_sites(model)[0].path
    before, after = plain[site][0], edited[site][0]
    assert torch.equal(before.dense()[~before.valid], after.dense()[~before.valid])
    assert not torch.equal(before.dense(), after.dense())
    close(after.dense()[after.valid].sum(0), before.dense()[before.valid].sum(0), "same_math_fp32")


@mixtures
def test_nothing_stays_of_an_edit(recipe: str) -> None:
    """Not after the block, not after an error in it; other threads and models do not see it; the innermost counts."""
    model, inputs = behaviours.armed(recipe, "llama"), padded("llama")
    other = behaviours.armed(recipe, "llama")
    plain, found = tiny.output(model, inputs), {}

    def fails(routing: Routing, scene: Scene) -> Routing:
        raise ZeroDivisionError if "layers.1" in scene.site else AssertionError

    with everywhere(uniform, model):
        edited = tiny.output(model, inputs)
        assert not torch.equal(edited, plain)
        assert torch.equal(tiny.output(other, inputs), plain)
        thread = threading.Thread(target=lambda: found.update(y=tiny.output(model, inputs)))
        thread.start()
        thread.join()
        with pytest.raises((ZeroDivisionError, AssertionError)):
            under(fails, model, inputs)
        close(under(top_1, model, inputs), under(top_1, other, inputs), "same_math_fp32")
        assert torch.equal(tiny.output(model, inputs), edited)
        with model.disable_adapter():
            assert torch.equal(tiny.output(model, inputs), tiny.output(tiny.base_model("llama"), inputs))
    assert torch.equal(found["y"], plain)
    assert torch.equal(tiny.output(model, inputs), plain)


def test_nothing_is_trained_on_edited_routing() -> None:
    model, inputs = behaviours.armed("mola", "llama"), padded("llama")
    for m in (model.train(), model.eval()):
        with everywhere(uniform, model), pytest.raises(ConfigError, match="no_grad"):
            m(**inputs)


def test_a_layer_alone_cannot_tell_padding() -> None:
    model = behaviours.armed("mola", "llama")
    with everywhere(uniform, model), pytest.raises(MoloraError, match="real tokens from padding"):
        model.model.layers[0].self_attn.q_proj(torch.randn(1, 3, 32))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_a_compiled_model_is_edited_as_the_plain_one(recipe: str) -> None:
    model, inputs = behaviours.armed(recipe, "llama"), padded("llama")
    del model.model.layers[1]  # half the graph to trace
    plain, wanted = tiny.output(model, inputs), under(uniform, model, inputs)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    for _ in range(2):
        close(tiny.output(compiled, inputs), plain, "same_math_fp32")
        with everywhere(uniform, model):
            close(tiny.output(compiled, inputs), wanted, "same_math_fp32")
    torch._dynamo.reset()


def test_edited_generation_is_that_of_edited_forwards() -> None:
    """With caches, also the scaling pass's own: under a gate that depends on nothing, token by token or at once."""
    model = behaviours.armed("xlora", "llama")
    ids = tiny.batch("llama")["input_ids"]
    with everywhere(uniform, model):
        new = model.generate(ids, max_new_tokens=5, do_sample=False)
        assert torch.equal(new[:, -1], tiny.output(model, {"input_ids": new[:, :-1]})[:, -1].argmax(-1))
    assert not torch.equal(new, model.generate(ids, max_new_tokens=5, do_sample=False))
