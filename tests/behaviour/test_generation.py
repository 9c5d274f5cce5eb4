"""Generation: whatever the cache, the decoding mode or the entrance, the same tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError
from tests.support import behaviours, tiny
from tests.support.behaviours import causal_matrix, each_recipe, over
from tests.support.tolerances import close

NEW = 12
FIXED = {"max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 0}
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
    "beams3": {"do_sample": False, "num_beams": 3},
    "beams4": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "beam_sampling": {"do_sample": True, "num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 3},
}
T5_PAIRS = [(r, n) for r, n in behaviours.PAIRS if n == "t5"]


def prompt(rows: int = 2, length: int = 5, pads: int = 2) -> dict[str, Tensor]:
    """Rows of unequal length, padded on the left with random tokens."""
    inputs = tiny.batch("llama", rows=rows, length=length, seed=4, labels=False)
    inputs["attention_mask"][0, :pads] = 0
    return inputs


def generate(model: Any, inputs: dict[str, Tensor], **search: Any) -> Tensor:
    torch.manual_seed(7)
    out: Tensor = model.generate(**inputs, **FIXED, **search)
    return out


@causal_matrix
def test_greedy_with_a_cache_is_greedy_without(recipe: str, name: str) -> None:
    model = behaviours.shared(recipe, name)
    ids = generate(model, prompt(), use_cache=True, do_sample=False)
    assert ids.shape == (2, 5 + NEW)
    assert torch.equal(ids, generate(model, prompt(), use_cache=False, do_sample=False))
    off = generate(tiny.base_model(name), prompt(), do_sample=False)
    assert not torch.equal(ids, off), "not armed: the base would say the same"
    with model.disable_adapter():
        assert torch.equal(generate(model, prompt(), do_sample=False), off)


@each_recipe
@pytest.mark.parametrize("search", [s for s in SEARCHES if s != "greedy"])
def test_every_search_with_a_cache_is_that_without(recipe: str, name: str, search: str) -> None:
    model = behaviours.shared(recipe, name)
    cached = generate(model, prompt(), use_cache=True, **SEARCHES[search])
    assert torch.equal(cached, generate(model, prompt(), use_cache=False, **SEARCHES[search]))


@over(T5_PAIRS)
def test_encoder_decoders(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), prompt()
    for search in ("greedy", "beams3"):
        cached = generate(model, inputs, use_cache=True, **SEARCHES[search])
        assert torch.equal(cached, generate(model, inputs, use_cache=False, **SEARCHES[search]))


@causal_matrix
@pytest.mark.parametrize("sizes", [(1,) * 9, (4, 3, 2)], ids=["steps", "chunks"])
def test_step_by_step_is_the_full_forward(recipe: str, name: str, sizes: tuple[int, ...]) -> None:
    """A cache made inside the first forward and handed on by the caller."""
    model, ids = behaviours.shared(recipe, name), tiny.batch(name)["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        cache, parts = None, []
        for part in ids.split(sizes, dim=1):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, 1), whole, "same_math_fp32")


@each_recipe
def test_steps_after_left_padding(recipe: str, name: str) -> None:
    """A mask longer than the step's tokens: its end belongs to them."""
    model, inputs = behaviours.shared(recipe, name), prompt(length=9)
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        cache, parts = None, []
        for n in range(1, 10):
            step = {
                "input_ids": ids[:, n - 1 : n],
                "attention_mask": mask[:, :n],
                "position_ids": positions[:, n - 1 : n],
            }
            out = model(**step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], "same_math_fp32")


@over([(r, n) for r in tiny.RECIPES for n in ("llama", "gpt_neox")])
def test_static_cache(recipe: str, name: str) -> None:
    model = behaviours.shared(recipe, name)
    expected = generate(model, prompt(), use_cache=False, do_sample=False)
    static = generate(model, prompt(), cache_implementation="static", do_sample=False, disable_compile=True)
    assert torch.equal(static, expected)
    assert torch.equal(
        generate(model, prompt(), cache_implementation="static", do_sample=False, disable_compile=True), expected
    )


@each_recipe
@pytest.mark.parametrize("draft", ["base", "mixture"])
def test_assisted_decoding(recipe: str, name: str, draft: str) -> None:
    """Drafts of another model are checked several tokens at once, and the cache is cropped where they are refused."""
    model, inputs = behaviours.shared(recipe, name), prompt(rows=1, pads=0)
    expected = generate(model, inputs, do_sample=False, use_cache=False)
    assistant = tiny.base_model(name) if draft == "base" else behaviours.shared("mola", "qwen3")
    assert torch.equal(generate(model, inputs, do_sample=False, assistant_model=assistant), expected)


@each_recipe
def test_prompt_lookup(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), prompt(rows=1, length=8, pads=0)
    expected = generate(model, inputs, do_sample=False, use_cache=False)
    assert torch.equal(generate(model, inputs, do_sample=False, prompt_lookup_num_tokens=3), expected)


@causal_matrix
def test_embeddings_instead_of_ids(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), prompt()
    mask, embeds = inputs["attention_mask"], model.get_input_embeddings()(inputs["input_ids"]).detach()
    with torch.no_grad():
        by_ids, by_embeds = model(**inputs).logits, model(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(by_embeds, by_ids)
    expected = generate(model, inputs, do_sample=False, use_cache=False)[:, -NEW:]
    got = generate(model, {"inputs_embeds": embeds, "attention_mask": mask}, do_sample=False)
    assert torch.equal(got, expected)


@causal_matrix
def test_packed_sequences(recipe: str, name: str) -> None:
    """Two texts in one row, told apart by their positions: the same as the two alone."""
    model, ids = behaviours.shared(recipe, name), tiny.batch(name, rows=1, length=9)["input_ids"]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        base = tiny.base_model(name)
        base_packed = base(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = [(model(input_ids=part).logits, base(input_ids=part).logits) for part in (ids[:, :4], ids[:, 4:])]
    close(base_packed, torch.cat([b for _, b in apart], 1), "same_math_fp32")
    close(packed, torch.cat([ours for ours, _ in apart], 1), "same_math_fp32")


def test_a_foreign_cache_is_refused_by_a_two_pass_model() -> None:
    model, ids = behaviours.shared("xlora", "llama"), tiny.batch("llama")["input_ids"]
    with torch.no_grad(), model.disable_adapter():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ConfigError, match="past_key_values"):
        model(input_ids=ids[:, 4:], past_key_values=cache, use_cache=True)
    with torch.no_grad():
        cache = model(input_ids=ids[:, :4], use_cache=True).past_key_values
        with model.disable_adapter():
            model(input_ids=ids[:, 4:6], past_key_values=cache, use_cache=True)
        with pytest.raises(ConfigError, match="halves"):
            model(input_ids=ids[:, 6:], past_key_values=cache, use_cache=True)
