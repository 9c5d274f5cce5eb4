"""Activation checkpointing: the same loss and the same gradients, bit for bit, however it is switched on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import noop_context_fn

import molora
from molora.errors import ConfigError, MoloraError
from tests.support import behaviours, tiny
from tests.support.behaviours import each_recipe, matrix
from tests.support.traits import traits

KWARGS = {"use_reentrant": False}


def padded_batch(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Labels are few and unequal from row to row; pads where the model knows them."""
    inputs = tiny.batch(name, rows=3, seed=seed)
    if "attention_mask" in inputs:
        inputs["attention_mask"][1, -3:] = 0
    if inputs["labels"].ndim == 2:
        inputs["labels"][1, -3:] = -100
        inputs["labels"][0, :2] = -100
    return inputs


def checked(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], int]:
    """A training step with the number of times that the last site ran with gradient: twice when it was recomputed.

    Without a cache, which checkpointing switches off.
    """
    runs: list[int] = []
    last = [m for _, m in behaviours.sites(model)][-1]
    handle = last.register_forward_pre_hook(lambda *args: runs.append(torch.is_grad_enabled()))
    more = {"use_cache": False} if hasattr(model.config, "use_cache") and model.can_generate() else {}
    torch.manual_seed(5)
    loss, grads = behaviours.train_step(model, inputs, **more)
    handle.remove()
    return loss, grads, sum(runs)


def assert_equal(got: tuple[Tensor, dict[str, Tensor], int], wanted: tuple[Tensor, dict[str, Tensor], int]) -> None:
    assert (got[2], wanted[2]) == (2, 1), "the layer was not recomputed"
    assert torch.equal(got[0], wanted[0])
    behaviours.assert_same(got[1], wanted[1])


@matrix
def test_same_loss_and_gradients(recipe: str, name: str) -> None:
    """With balance loss, padding and masked labels, on every model."""
    model, inputs = behaviours.armed(recipe, name), padded_batch(name)
    if name == "t5":  # its position bias asks for a gradient when checkpointed, so that SDPA takes another kernel
        model.set_attn_implementation("eager")
    wanted = checked(model, inputs)
    model.gradient_checkpointing_enable()
    assert_equal(checked(model, inputs), wanted)
    model.gradient_checkpointing_disable()
    again = checked(model, inputs)
    assert again[2] == 1
    behaviours.assert_same(again[1], wanted[1])


def with_context() -> dict[str, Any]:
    entered: list[str] = []

    @contextlib.contextmanager
    def note(what: str) -> Any:
        entered.append(what)
        yield

    return {**KWARGS, "context_fn": lambda: (note("forward"), note("recompute")), "determinism_check": "none"}


WAYS: dict[str, Callable[[Any], None]] = {
    "gradient": lambda m: m.gradient_checkpointing_enable(),
    "gradient_kwargs": lambda m: m.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KWARGS),
    "activation": lambda m: m.activation_checkpointing_enable(),
    "activation_kwargs": lambda m: m.activation_checkpointing_enable(activation_checkpointing_kwargs=KWARGS),
    "own_context": lambda m: m.activation_checkpointing_enable(activation_checkpointing_kwargs=with_context()),
    "no_context": lambda m: m.gradient_checkpointing_enable({**KWARGS, "context_fn": noop_context_fn}),
}


@functools.cache
def without_checkpointing(recipe: str, name: str) -> tuple[Tensor, dict[str, Tensor], int]:
    """The step with dropout on the experts' input that every way is compared with."""
    options = behaviours.options(recipe, name, lora_dropout=0.2)
    return checked(tiny.arm(molora.convert(tiny.base_model(name), recipe, **options)), padded_batch(name))


@each_recipe
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_switch_it_on(recipe: str, name: str, way: str, when: str) -> None:
    """Before and after the conversion; with dropout on the experts' input."""
    options = behaviours.options(recipe, name, lora_dropout=0.2)
    inputs, wanted = padded_batch(name), without_checkpointing(recipe, name)
    model = tiny.base_model(name, trainable=True)
    if when == "before":
        WAYS[way](model)
        model.train()
    before = behaviours.snapshot(model)
    tiny.arm(molora.convert(model, recipe, **options))
    if when == "after":
        WAYS[way](model)
    assert_equal(checked(model, inputs), wanted)
    if when == "before":
        model.unload()
        assert behaviours.snapshot(model) == before


@each_recipe
@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first_first", "last_first"])
def test_two_forwards_before_two_backwards(recipe: str, name: str, order: tuple[int, int]) -> None:
    """As preference training does; both micro-batches have their own padding, tasks and gates."""
    model = behaviours.armed(recipe, name).train()
    batches = [padded_batch(name, seed=1), tiny.batch(name, rows=2, length=5, seed=2)]
    results = []
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        losses = [behaviours.loss_of(model, b) for b in batches]
        for i in order:
            losses[i].backward()
        results.append((torch.stack(losses).detach(), behaviours.gradients(model)))
        model.gradient_checkpointing_enable()
    assert torch.equal(results[0][0], results[1][0])
    behaviours.assert_same(results[0][1], results[1][1])


@each_recipe
def test_re_entrant_is_refused_where_it_would_be_wrong(recipe: str, name: str) -> None:
    wrong = {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    model = behaviours.armed(recipe, name)
    early = tiny.base_model(name)
    early.gradient_checkpointing_enable(**wrong)
    before = behaviours.snapshot(early)
    if not traits(recipe).refuses_re_entrant:  # its sites need nothing from outside of the layer
        inputs = padded_batch(name)
        wanted = checked(model, inputs)
        model.gradient_checkpointing_enable(**wrong)
        loss, grads, _ = checked(model, inputs)
        assert torch.equal(loss, wanted[0])
        behaviours.assert_same(grads, wanted[1])
        return
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.gradient_checkpointing_enable(**wrong)
    assert not model.is_gradient_checkpointing
    with pytest.raises(ConfigError, match="use_reentrant"):
        molora.convert(early, recipe, **behaviours.options(recipe, name))
    assert behaviours.snapshot(early) == before


@each_recipe
def test_off_in_the_forward_is_off_in_the_recompute(recipe: str, name: str) -> None:
    """A reference pass with the adapter off, whose backward runs after the block has ended."""
    results = []
    for switch_on in (False, True):
        model = behaviours.armed(recipe, name).train()
        if switch_on:
            model.gradient_checkpointing_enable()
        embeds = model.get_input_embeddings()(tiny.batch(name)["input_ids"]).detach().requires_grad_()
        with model.disable_adapter():
            loss = model(inputs_embeds=embeds, labels=tiny.batch(name)["labels"]).loss
        loss.backward()
        results.append((loss.detach(), embeds.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@each_recipe
def test_a_foreign_checkpoint_function_raises_or_is_right(recipe: str, name: str) -> None:
    """Layers checkpointed from outside, as FSDP and DeepSpeed do: never silently wrong."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    model, inputs = behaviours.armed(recipe, name), padded_batch(name)
    wanted = checked(model, inputs)
    layers = tuple(model.model.layers)
    apply_activation_checkpointing(model, check_fn=lambda m: m in layers)
    if not traits(recipe).needs_frame_again:  # a bias that was counted in the forward needs nothing in the recompute
        loss, grads, runs = checked(model, inputs)
        assert runs == 2
        assert torch.equal(loss, wanted[0])
        behaviours.assert_same({n.replace("_checkpoint_wrapped_module.", ""): g for n, g in grads.items()}, wanted[1])
        return
    with pytest.raises(MoloraError, match="not there"):
        checked(model, inputs)
