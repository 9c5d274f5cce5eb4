"""The ways in from a folder: molora's own by base name, and PEFT LoRA folders with safetensors or a pickle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import molora
from molora.errors import AdapterError, MoloraError, TargetError
from tests.support.tiny import base_model, batch, converted, output, write_adapter


def test_the_base_named_in_the_folder_is_loaded(tmp_path: Path, root: Path):
    base_model("llama").save_pretrained(tmp_path / "base")
    base = type(base_model("llama")).from_pretrained(tmp_path / "base")
    model = molora.convert(base, "mola", r=4, init_lora_weights=False).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = molora.from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, batch("llama")), output(model, batch("llama")))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert any(p.requires_grad for p in molora.from_pretrained(tmp_path / "adapter", trainable=True).parameters())


def test_a_folder_without_a_base_name_says_what_to_call(tmp_path: Path, root: Path):
    converted("mola", "llama", root).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"names no base model.*molora\.load"):
        molora.from_pretrained(tmp_path)


def test_a_pickle_is_read_only_when_allowed(tmp_path: Path):
    folder = write_adapter(tmp_path / "lora", "llama", r=4, seed=1)
    expected = output(molora.load(base_model("llama"), folder), batch("llama"))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MoloraError, match="allow_pickle"):
        molora.load(base_model("llama"), folder)
    loaded = molora.load(base_model("llama"), folder, allow_pickle=True)
    assert torch.equal(output(loaded, batch("llama")), expected)


def test_a_class_that_transformers_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base_model("llama").save_pretrained(tmp_path / "base")
    model = type(base_model("llama")).from_pretrained(tmp_path / "base")
    molora.convert(model, "lora").save_pretrained(tmp_path / "adapter")
    import transformers

    monkeypatch.setattr(transformers, "LlamaForCausalLM", print)
    with pytest.raises(TargetError, match="not one of transformers"):
        molora.from_pretrained(tmp_path / "adapter")
