"""What was loaded from a foreign folder is an ordinary mixture: it trains on, generates, exports and unloads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import molora
from molora.surgery.install import sites_of
from tests.support.foreign_cases import FORMATS
from tests.support.tiny import base_model, batch, output

# What trains on when asked to: the released code's own choice, or the recipe's where a config records it.
TRAINED = {
    "peft_lora": {"bank"},
    "peft_xlora": {"router"},
    "xlora": {"router"},
    "mixlora": {"bank", "router"},
    "moe_peft_mola": {"bank", "router"},
    "moe_peft_loramoe": {"bank", "router"},
    "mola": {"bank", "router"},
    "meteora": {"bank", "router"},
}


@pytest.mark.parametrize("form", FORMATS)
def test_it_trains_on(form: str, tmp_path: Path):
    make, _, more = FORMATS[form]
    make(tmp_path / "x")
    model = molora.load(base_model("llama"), tmp_path / "x", trainable=True, **more).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kinds = {"router" if "router" in n else "bank" for n in trained}
    assert kinds == TRAINED[form]
    model(**batch("llama"), task_ids=torch.tensor([0, 1]) if form == "meteora" else None).loss.backward()
    assert all(p.grad is not None for p in trained.values())
    assert sum(bool(p.grad.any()) for p in trained.values()) > 0.9 * len(trained)


@pytest.mark.parametrize("form", FORMATS)
def test_it_generates_exports_an_expert_and_leaves_the_base_as_it_was(form: str, tmp_path: Path):
    make, _, more = FORMATS[form]
    make(tmp_path / "x")
    model = molora.load(base_model("llama"), tmp_path / "x", **more).eval()
    ids = batch("llama")["input_ids"]
    cached, again = (model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False))
    assert torch.equal(cached, again)
    model.export_expert(0, tmp_path / "expert")
    expert = molora.load(base_model("llama"), tmp_path / "expert")
    banks = {p: m.bank.expert(0) for p, m in sites_of(model).values() if m.bank is not None}
    for path, m in sites_of(expert).values():
        A, B, scale = banks[path]
        own = m.bank.expert(0)
        torch.testing.assert_close(own[2] * (own[1] @ own[0]), scale * (B @ A))
    assert torch.equal(output(model.unload(), batch("llama")), output(base_model("llama"), batch("llama")))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_checkpoints_on_half_precision_bases(dtype: torch.dtype, tmp_path: Path):
    """Adapters and routers are float32 all the same, with the values of the file."""
    from safetensors.torch import load_file, save_file

    make, name, more = FORMATS["mola"]
    make(tmp_path / "x")
    tensors = {k: t.to(dtype) for k, t in load_file(tmp_path / "x" / name).items()}
    save_file(tensors, tmp_path / "x" / name)
    model = molora.load(base_model("llama").to(dtype), tmp_path / "x", **more).eval()
    site = model.model.layers[0].mlp.up_proj
    key = "base_model.model.model.layers.0.mlp.up_proj"
    assert torch.equal(site.router.weight, tensors[f"{key}.router.router.weight"].float())
    assert torch.equal(site.bank.expert(1)[0], tensors[f"{key}.lora_A_1.weight"].float())
    assert output(model, batch("llama")).dtype == dtype
