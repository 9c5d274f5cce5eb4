"""The cache of a model-wide router's two passes: compiled decoding, continuous batching, forwards that were cut off."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

from molora.errors import ConfigError
from tests.support.tiny import batch, converted
from tests.support.tolerances import close

IDS = batch("llama", rows=2, length=20)["input_ids"]
KINDS: dict[str, Any] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config, max_cache_len=32),
}


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_decoding_compiles_once(kind: str, root: Path) -> None:
    """More steps than torch compiles variants of one function; each length must not be a new one."""
    model = converted("xlora", "llama", root, scaling_pass_value=0.5).eval()
    cache, step = KINDS[kind](model.config), torch.compile(model, fullgraph=True, backend="eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        logits = [model(input_ids=IDS[:, :4], past_key_values=cache).logits]
        logits += [step(input_ids=IDS[:, i : i + 1], past_key_values=cache).logits for i in range(4, 20)]
        close(torch.cat(logits, 1), model(input_ids=IDS, use_cache=False).logits, "same_math_fp32")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # the first length, and then any


class Paged:
    """What continuous batching hands to the model instead of a Cache: attention writes into it."""

    def update(self, *_: Any) -> None:
        raise AssertionError("nothing is written")


def test_keys_kept_outside_of_a_cache_are_refused(root: Path) -> None:
    """Both passes would write into one store, and the second would read the first's."""
    model = converted("xlora", "llama", root).eval()
    with pytest.raises(ConfigError, match=r"cache: got a Paged.*without continuous batching"):
        model(input_ids=IDS, cache=Paged())


@pytest.mark.parametrize("at", [1, 2])
def test_a_forward_that_was_cut_off_is_noticed_or_harmless(at: int, root: Path) -> None:
    """An exception in the first layer, in either pass: the halves are joined again, and no other numbers come out."""
    model = converted("xlora", "llama", root, scaling_pass_value=0.5).eval()
    cache, calls = DynamicCache(config=model.config), itertools.count(1)
    model(input_ids=IDS[:, :4], past_key_values=cache)

    def cut(*_: Any) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt

    hook = model.model.layers[0].register_forward_pre_hook(cut)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=IDS[:, 4:5], past_key_values=cache)
    hook.remove()
    assert len(cache.layers) == 4
    if at == 1:
        with torch.no_grad():
            again = model(input_ids=IDS[:, 4:], past_key_values=cache).logits
            close(again, model(input_ids=IDS, use_cache=False).logits[:, 4:], "same_math_fp32")
    else:
        with pytest.raises(ConfigError, match="a forward was cut off"):
            model(input_ids=IDS[:, 4:5], past_key_values=cache)
