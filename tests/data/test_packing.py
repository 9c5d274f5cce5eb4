"""Packing: a text in a packed row is computed as if it stood alone, and models that cannot do that are refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import molora
from molora.data.examples import IGNORED, Collator, Example
from molora.data.packing import check_packing, pack
from molora.errors import ConfigError
from tests.support.tiny import CAUSAL, RECIPES, base_model, converted
from tests.support.tolerances import close

LORA = molora.recipes.lora()


def texts(*lengths: int, seed: int = 0) -> list[Example]:
    """Rows of random tokens, the first two of each masked as a prompt is."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 64, (n,), generator=g).tolist() for n in lengths]
    return [Example(input_ids=i, labels=[IGNORED] * 2 + i[2:]) for i in ids]


# ---------------------------------------------------------------------------------------------------------------- rows


@given(st.lists(st.integers(3, 20), min_size=1, max_size=120), st.integers(20, 40))
def test_every_text_is_in_one_row_whole(lengths: list[int], max_length: int) -> None:
    rows = texts(*lengths)
    packed = pack(rows, max_length)
    found = []
    for row in packed:
        assert len(row["input_ids"]) == len(row["labels"]) == len(row["position_ids"]) <= max_length
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0]
        for a, b in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][a:b] == list(range(b - a))
            assert row["labels"][a] == IGNORED
            found.append((row["input_ids"][a:b], row["labels"][a:b]))
    assert sorted(found) == sorted((r["input_ids"], r["labels"]) for r in rows)
    assert sum(len(r["input_ids"]) for r in packed) > len(packed) // 2 * max_length // 2  # no two halves stay apart


def test_a_text_that_begins_with_a_label_does_not_learn_it_from_the_text_before() -> None:
    (row,) = pack([Example(input_ids=[5, 6], labels=[5, 6]), Example(input_ids=[7, 8], labels=[7, 8])], 8)
    assert row["labels"] == [IGNORED, 6, IGNORED, 8]


def test_experts_are_named_for_each_token_and_rows_laid_end_to_end() -> None:
    rows = texts(3, 4, 5)
    for task, row in zip((1, IGNORED, 0), rows, strict=True):
        row["task_ids"] = task
    batch = Collator()(pack(rows, 8))
    assert batch["task_ids"].tolist() == [[1] * 3 + [IGNORED] * 4 + [0] * 5]
    assert batch["position_ids"].tolist() == [[*range(3), *range(4), *range(5)]]
    assert "attention_mask" not in batch  # with one, transformers would not look at the positions


# -------------------------------------------------------------------------------------------------------------- models


def losses(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of each label, in the order of the tokens."""
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="none")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*CAUSAL, "gemma3", "mistral"])
def test_a_packed_row_has_the_losses_of_its_texts(name: str, attention: str) -> None:
    model = base_model(name)
    model.set_attn_implementation(attention)
    rows = texts(7, 5, 9)
    packed, alone = (losses(model, Collator()(r)) for r in (pack(rows, 32), rows))
    assert packed.numel() == 15
    close(packed, alone, "same_math_fp32")
    check_packing(model, LORA)


@pytest.mark.parametrize("recipe", RECIPES)
def test_mixtures_pack_like_their_base(recipe: str, root: Path) -> None:
    model = converted(recipe, "llama", root)
    rows = texts(7, 5, 9)
    close(*(losses(model, Collator()(r)) for r in (pack(rows, 32), rows)), "same_math_fp32")


def test_a_pooled_balance_loss_sees_the_same_tokens(root: Path) -> None:
    """Padding is left out of the one, and not there in the other."""
    model = converted("mola", "llama", root, balance_scope="batch").train()
    rows = texts(7, 5, 9)
    packed, padded = (model(**Collator()(r), use_cache=False) for r in (pack(rows, 32), rows))
    close(packed.aux_loss, padded.aux_loss, "same_math_fp32")
    close(packed.loss, padded.loss, "same_math_fp32")


def opt() -> Any:
    return base_model("opt")


def mamba() -> Any:
    return tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4))


def bloom() -> Any:
    return tf.BloomForCausalLM(tf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64))


@pytest.mark.parametrize("build", [opt, mamba, bloom])
def test_a_model_that_looks_at_the_text_before_is_refused(build: Any) -> None:
    model = build().train()
    with pytest.raises(ConfigError, match="does not keep the texts of a packed row apart"):
        check_packing(model, LORA)
    assert model.training


def test_half_precision_is_told_from_looking_at_the_text_before() -> None:
    check_packing(base_model("llama").bfloat16(), LORA)
    with pytest.raises(ConfigError, match="does not keep"):
        check_packing(opt().bfloat16(), LORA)


def test_an_expert_with_room_for_some_tokens_of_a_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="packing: got experts with a capacity per row"):
        check_packing(base_model("llama"), molora.recipes.mixlora(routing="switch"))


def test_a_model_that_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigError, match="packing: T5ForConditionalGeneration cannot run a packed row"):
        check_packing(base_model("t5"), LORA)
    model = base_model("llama")
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks what it took apart
    with pytest.raises(ConfigError, match="which ZeRO-3 took apart already"):
        check_packing(model, LORA)


def test_a_glance_below_rounding_is_noticed() -> None:
    model = copy.deepcopy(base_model("llama"))
    model.model.norm.register_forward_hook(lambda _, __, out: out + 1e-5 * out.roll(1, 1))
    with pytest.raises(ConfigError, match="does not keep"):
        check_packing(model, LORA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_that_are_ignored_are_noticed(dtype: torch.dtype) -> None:
    """Masked right, but the second text would be computed as if it stood further along."""
    model = copy.deepcopy(base_model("gpt2")).to(dtype)
    inner = model.transformer.wpe
    inner.register_forward_pre_hook(lambda _, a: (torch.arange(a[0].shape[-1]).unsqueeze(0),))
    with pytest.raises(ConfigError, match="does not keep"):
        check_packing(model, LORA)
