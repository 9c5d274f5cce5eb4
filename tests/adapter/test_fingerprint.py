"""Which base an adapter belongs to: known again after saving and casting, told apart from others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from molora.adapter.folder import check_fingerprint, fingerprint, read_adapter
from molora.errors import AdapterError
from tests.support import behaviours, tiny


@pytest.mark.parametrize("name", list(tiny.BUILDERS))
def test_a_base_is_known_again(name: str, tmp_path: Path):
    base = tiny.base_model(name)
    known = fingerprint(base)
    assert known["class"] == type(base).__name__
    assert known["num_layers"] == 2
    base.save_pretrained(tmp_path)
    again = fingerprint(type(base).from_pretrained(tmp_path, dtype=torch.bfloat16))
    assert again.pop("base_model_name_or_path") == str(tmp_path)
    assert again == {k: v for k, v in known.items() if k != "base_model_name_or_path"}


def test_how_a_base_is_run_does_not_change_what_it_is():
    base = tiny.base_model("llama")
    known = fingerprint(base)
    base.config.use_cache = False
    base.config.pad_token_id = 7
    base.config.attention_dropout = 0.5
    base.config.problem_type = "regression"
    base.config._attn_implementation = "eager"
    base.config.id2label = {0: "a", 1: "b"}
    assert fingerprint(base.to(torch.float16)) == known
    base.config.rope_parameters = {**base.config.rope_parameters, "rope_theta": 7.0}
    assert fingerprint(base) != known


def test_a_conversion_keeps_the_fingerprint():
    assert fingerprint(behaviours.armed("mola", "llama")) == fingerprint(tiny.base_model("llama"))


def test_another_base_is_refused_with_both_shown(tmp_path: Path):
    behaviours.armed("lora", "llama").save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    check_fingerprint(adapter, tiny.base_model("llama"))
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**tiny.GQA, "vocab_size": 65}))
    with pytest.raises(AdapterError, match="vocab_size") as e:
        check_fingerprint(adapter, other)
    assert "vocab_size=64" in str(e.value)
    assert "vocab_size=65" in str(e.value)
    assert "ignore_base=True" in str(e.value)
    check_fingerprint(adapter, other, ignore=True)
    with pytest.raises(AdapterError, match="class"):
        check_fingerprint(adapter, tiny.base_model("qwen3"))


def test_a_module_without_a_config_has_a_fingerprint():
    known = fingerprint(nn.Linear(2, 3))
    assert (known["class"], known["hidden_size"]) == ("Linear", None)
