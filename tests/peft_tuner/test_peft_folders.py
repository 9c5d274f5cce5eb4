"""PEFT folders with more than LoRA matrices in them: several adapters, whole trained modules, targeted parameters."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import AdapterError, ConfigError
from tests.adapter.test_peft_lora import loaded_by_peft
from tests.support.tiny import base_model, batch, output
from tests.support.tolerances import close

peft = pytest.importorskip("peft", reason="the comparison is with PEFT itself, which the extra `peft` installs")


def trained(name: str, folder: Path, **options: Any) -> Any:
    """PEFT's LoRA with random A and B, and every other trained weight moved, saved into ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model(name), peft.LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora_" not in n:
                p.add_(torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


# ---- whole trained modules ----

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "head_of_a_classifier": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "named": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_modules_to_save_come_with_the_lora(case: str, tmp_path: Path):
    name, options = WHOLE[case]
    theirs = trained(name, tmp_path / "peft", r=4, lora_alpha=6, **options)
    ours = molora.load(base_model(name), tmp_path / "peft").eval()
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    with torch.no_grad():
        expected = theirs(**inputs).logits
    close(output(ours, inputs), expected, "peft_lora")
    with ours.disable_adapter():
        assert torch.equal(output(ours, inputs), output(base_model(name), inputs))
    ours.save_pretrained(tmp_path / "own")
    assert torch.equal(output(molora.load(base_model(name), tmp_path / "own").eval(), inputs), output(ours, inputs))


def test_an_expert_cannot_have_whole_trained_modules(tmp_path: Path):
    trained("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier"])
    with pytest.raises(AdapterError, match="modules_to_save.*cannot be mixed"):
        molora.convert(base_model("bert"), "meteora", adapters={"a": str(tmp_path), "b": str(tmp_path)})


def test_a_whole_module_that_is_not_there_is_refused(tmp_path: Path):
    trained("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier", "pooler"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "pooler" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"the file has no bert\.pooler"):
        molora.load(base_model("bert"), tmp_path)


# ---- parameters instead of modules ----


def test_weights_of_linears_reached_as_parameters(tmp_path: Path):
    """Patterns are matched with the parameter's name there: "q_proj" fits none of them, "up_proj.weight" does."""
    options: dict[str, Any] = {
        "target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"],
        "alpha_pattern": {"q_proj": 32, "up_proj.weight": 1, "v_proj": 3},
    }  # fmt: skip
    theirs = trained("llama", tmp_path, r=4, lora_alpha=8, **options)
    ours = molora.load(base_model("llama"), tmp_path).eval()
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    with torch.no_grad():
        close(output(ours, inputs), theirs(**inputs).logits, "peft_lora")


def test_a_weight_that_is_stored_transposed_is_refused(tmp_path: Path):
    trained("gpt2", tmp_path, r=4, target_modules=[], target_parameters=["attn.c_proj.weight"])
    with pytest.raises(AdapterError, match="stores its weight transposed"):
        molora.load(base_model("gpt2"), tmp_path)


# ---- the base's own tensors ----


def test_the_frozen_weight_that_peft_writes_of_an_adapted_output_layer(tmp_path: Path):
    theirs = trained("llama", tmp_path, r=4, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "adapter_model.safetensors")
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    for dtype, tolerance in ((torch.float32, "peft_lora"), (torch.bfloat16, "bf16")):
        with torch.no_grad():
            expected = theirs.to(dtype)(**inputs).logits
        close(output(molora.load(base_model("llama").to(dtype), tmp_path).eval(), inputs), expected, tolerance)
    changed = base_model("llama")
    changed.lm_head.weight.data[0, 0] += 1e-3
    with pytest.raises(AdapterError, match="brings a weight for lm_head that is not this base's"):
        molora.load(changed, tmp_path)


# ---- several adapters ----


def test_one_of_several_adapters_is_asked_for_by_name(tmp_path: Path):
    model = trained("llama", tmp_path / "unused", r=4, target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "named", selected_adapters=["other"])
    for folder, more in (("both", {}), ("named", {"adapters": "other"}), ("both", {"adapters": "other"})):
        ours = molora.load(base_model("llama"), tmp_path / folder, **more)
        place = tmp_path / folder / more.get("adapters", "")
        close(output(ours, batch("llama")), output(loaded_by_peft("llama", place), batch("llama")), "peft_lora")
    with pytest.raises(ConfigError, match=r"which adapter to load, of other.*adapters='other'"):
        molora.load(base_model("llama"), tmp_path / "named")
    with pytest.raises(ConfigError, match="'othr', expected one of other; did you mean 'other'"):
        molora.load(base_model("llama"), tmp_path / "named", adapters="othr")
    with pytest.raises(ConfigError, match=r"\['adapters'\], but .* needs nothing more"):
        molora.load(base_model("llama"), tmp_path / "unused", adapters="default")
    with pytest.raises(ConfigError, match=r"adapters: got \['a'\], expected str"):
        molora.load(base_model("llama"), tmp_path / "named", adapters=["a"])
