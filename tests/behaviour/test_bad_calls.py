"""Bad calls of a converted model: one clear error before any arithmetic, and the next good call computes as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import molora
from molora import context
from molora.errors import ConfigError, MoloraError
from tests.support.behaviours import armed, snapshot
from tests.support.tiny import base_model, batch, converted, output
from tests.support.traits import having, traits

IDS = torch.arange(3, 13).view(2, 5)


def refused(model: Any, call: Callable[[], Any], error: type[Exception], words: str) -> None:
    """The error; weights, modules and context as before; and the same outputs afterwards."""
    inputs = batch("llama")
    expected, before = output(model, inputs), snapshot(model)
    with pytest.raises(error, match=f"(?s){words}") as e:
        call()
    assert type(e.value) is error
    assert len(str(e.value)) < 1500
    assert context.current() is None
    assert snapshot(model) == before
    assert torch.equal(output(model, inputs), expected)


ones = torch.ones
# name: (arguments beside the ids, what the message must say)
FORWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "mask of fewer tokens": ({"attention_mask": ones(2, 4)}, r"attention_mask: got shape \(2, 4\), expected \(2, 5\)"),
    "mask of other rows": ({"attention_mask": ones(3, 5)}, r"attention_mask: got shape \(3, 5\)"),
    "mask of one dimension": ({"attention_mask": ones(5)}, r"attention_mask: got shape \(5,\)"),
    "mask of three dimensions": ({"attention_mask": ones(2, 5, 5)}, "1 for a real token, 0 for padding"),
    "no rows": ({"input_ids": IDS[:0]}, r"the batch is empty: got an input of shape \(0, 5\)"),
    "no tokens": ({"input_ids": IDS[:, :0]}, r"the batch is empty: got an input of shape \(2, 0\)"),
    "task ids of other rows": ({"task_ids": torch.tensor([0, 1, 2])}, r"task_ids: got torch.int64 of shape \(3,\)"),
    "task ids of three dimensions": ({"task_ids": torch.zeros(2, 5, 1).long()}, "expected integers of shape"),
    "task ids that are numbers": ({"task_ids": torch.tensor([0.0, 1.0])}, "task_ids: got torch.float32"),
    "task ids out of range": ({"task_ids": torch.tensor([0, 3])}, "got 3, expected an index from 0 to 2, or -100"),
    "negative task ids": ({"task_ids": torch.tensor([0, -1])}, "got -1, expected an index from 0 to 2, or -100"),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("training", [False, True])
def test_forward(name: str, training: bool):
    own, words = FORWARDS[name]
    model = armed("meteora", "llama").train(training)
    refused(model, lambda: model(**{"input_ids": IDS, **own}), ConfigError, words)


def test_task_ids_per_token_of_another_length():
    model = armed("meteora", "llama").train()
    inputs = {**batch("llama"), "task_ids": torch.zeros(2, 4).long()}
    refused(model, lambda: model(**inputs), ConfigError, r"task_ids: got shape \(2, 4\).*\(2, 9\)")


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_masks_and_empty_batches_of_others(recipe: str):
    model = armed(recipe, "llama")
    for name in ("mask of fewer tokens", "no rows", "no tokens"):
        own, words = FORWARDS[name]
        refused(model, lambda o=own: model(**{"input_ids": IDS, **o}), ConfigError, words)


def test_positional_arguments_are_bound_as_the_base_binds_them():
    model = armed("mola", "llama")
    assert torch.equal(model(IDS, torch.ones_like(IDS)).logits, model(input_ids=IDS).logits)
    refused(model, lambda: model(IDS, input_ids=IDS), TypeError, "positional arguments")


# ---- caches that a two-pass model cannot pair ----


def filled_by_the_base() -> Any:
    return base_model("llama")(input_ids=IDS, use_cache=True).past_key_values


def test_cache_of_another_model():
    model, cache = armed("xlora", "llama"), filled_by_the_base()
    call = lambda: model(input_ids=IDS[:, :1], past_key_values=cache)  # noqa: E731
    refused(model, call, ConfigError, "a cache with 5 tokens.*Start from an empty cache")
    assert len(cache.layers) == 2, "it can still be used with the model that filled it"
    assert int(cache.get_seq_length()) == 5


def test_cache_of_an_unknown_kind():
    model = armed("xlora", "llama")
    call = lambda: model(input_ids=IDS, past_key_values=((IDS, IDS),))  # noqa: E731
    refused(model, call, ConfigError, "got a tuple, expected a transformers Cache.*use_cache=False")


def test_cache_that_went_on_without_the_adapter():
    """The bare base filled its half for some tokens: the scaling pass has nothing for them."""
    model = armed("xlora", "llama")
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS, past_key_values=cache, use_cache=True)
        real = cache.layers[: cache._molora_real_layers]
        for layer in real:
            layer.update(torch.zeros(2, 2, 1, 8), torch.zeros(2, 2, 1, 8))
    call = lambda: model(input_ids=IDS[:, :1], past_key_values=cache)  # noqa: E731
    refused(model, call, ConfigError, r"two halves hold \[5, 6\] tokens.*empty cache")


# ---- dtypes ----


@pytest.mark.parametrize("recipe", molora.RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_without_autocast_works(recipe: str, dtype: torch.dtype, root: Path):
    """A half base with float32 experts needs no autocast: outputs in the base's dtype, gradients in the experts'."""
    from tests.support.tiny import options

    model = molora.convert(base_model("llama").to(dtype), recipe, **options(recipe, "llama", root)).train()
    out = model(**batch("llama"))
    assert out.logits.dtype == dtype
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in grads)


def test_inputs_of_another_dtype_than_the_weights():
    model = armed("mola", "llama")
    embeds = torch.randn(2, 5, 32).bfloat16()
    call = lambda: model.model.layers[0].self_attn.q_proj(embeds)  # noqa: E731
    refused(model, call, ConfigError, "got an input of torch.bfloat16 on weights of torch.float32.*autocast")


# ---- methods ----


def test_methods():
    model = armed("mola", "llama")
    refused(model, model.merge_and_unload, ConfigError, "mixes experts by the token.*export_expert")
    refused(model, lambda: model.export_expert("math", "x"), ConfigError, "got 'math'")
    refused(model, lambda: model.export_expert(99, "x"), ConfigError, "an index from 0 to 5")
    refused(model, lambda: model.export_expert(-1, "x"), ConfigError, "an index from 0 to 5")
    named = armed("xlora", "llama")
    refused(named, lambda: named.export_expert("mth", "x"), ConfigError, "did you mean 'math'")
    with pytest.raises(ConfigError, match="plain LlamaForCausalLM, expected a model that convert"):
        molora.record_routing(base_model("llama")).__enter__()


@pytest.mark.parametrize("recipe", having(lambda t: t.needs_frame))
def test_layers_called_outside_of_the_model(recipe: str, root: Path):
    """Where the context matters (a loss to collect, model-wide gates) a bare layer raises; it never falls back."""
    model = converted(recipe, "llama", root).train()
    layer, x = model.model.layers[0].mlp, torch.randn(1, 3, 32)
    with pytest.raises(MoloraError, match=r"(?s)outside of the converted model's forward.*activation checkpointing"):
        layer(x)
    if not traits(recipe).model_wide:
        layer.eval()
        assert layer(x).isfinite().all()


def test_reentrant_checkpointing():
    model = armed("mixlora", "llama")
    call = lambda: model.gradient_checkpointing_enable({"use_reentrant": True})  # noqa: E731
    refused(model, call, ConfigError, "use_reentrant=True.*'use_reentrant': False")
