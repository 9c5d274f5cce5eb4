"""Adapters of PEFT's methods become LoRA folders: measured against what the installed PEFT computes with them."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.errors import AdapterError
from molora.interop.to_lora import to_lora
from tests.support import tiny

peft: Any = pytest.importorskip("peft", reason="the measure of these tests is the installed PEFT")

LINEARS = ["q_proj", "v_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "mlp.c_proj"]
ANY: dict[str, Any] = {"target_modules": LINEARS}
FULL = 1.0  # all of the change's square
# Float32 sums through two layers, and PEFT's own share of 1.0, which leaves out what float32 rounds away.
NOTHING = 5e-4
SAME = 1e-4  # two measurements of one error, in float32

BY_PEFT = {
    "miss": lambda: peft.MissConfig(**ANY, r=4),
    "miss_bat": lambda: peft.MissConfig(**ANY, r=4, init_weights="bat"),
    "randlora": lambda: peft.RandLoraConfig(**ANY, r=4),
    "loha": lambda: peft.LoHaConfig(**ANY),
    "lokr": lambda: peft.LoKrConfig(**ANY),
    "vera": lambda: peft.VeraConfig(**ANY, r=8),
    "fourierft": lambda: peft.FourierFTConfig(**ANY, n_frequency=50),
    "c3a": lambda: peft.C3AConfig(**ANY, block_size=16),
    "delora": lambda: peft.DeloraConfig(**ANY),
    "vblora": lambda: peft.VBLoRAConfig(**ANY, vector_length=16, num_vectors=8, topk=2),
}
BY_DIFFERENCE = {
    "lora": lambda: peft.LoraConfig(**ANY, r=6, lora_alpha=16, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**ANY, r=4, use_dora=True),
    "pissa": lambda: peft.LoraConfig(**ANY, r=4, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(**ANY, r=4, init_lora_weights="olora"),
    "adalora": lambda: peft.AdaLoraConfig(**ANY, init_r=4, total_step=10),
    "shira": lambda: peft.ShiraConfig(**ANY, r=2),
    "oft": lambda: peft.OFTConfig(**ANY, oft_block_size=8, use_cayley_neumann=False),
    "hra": lambda: peft.HRAConfig(**ANY),
    "ia3": lambda: peft.IA3Config(**ANY, feedforward_modules=["down_proj"]),
    "hira": lambda: peft.HiraConfig(**ANY),
}
METHODS = {**BY_PEFT, **BY_DIFFERENCE}


def trained(folder: Path, config: Any, name: str = "llama", spread: float = 0.05, **base: Any) -> Any:
    """PEFT's model as after training, every trained parameter moved from its start; saved in ``folder``."""
    model = peft.get_peft_model(tiny.base_model(name).to(**base) if base else tiny.base_model(name), config).eval()
    g = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=g) * spread)
    model.save_pretrained(folder)
    return model


def relative(model: Any, adapter: Any, name: str = "llama") -> float:
    """How far ``model`` is from the adapter's model, of how far that is from the base."""
    inputs = tiny.batch(name)
    theirs, base = tiny.output(adapter, inputs), tiny.output(tiny.base_model(name), inputs)
    return float((tiny.output(model, inputs) - theirs).norm() / (theirs - base).norm())


@pytest.mark.parametrize("method", METHODS)
def test_at_full_rank_the_expert_computes_what_the_adapter_computes(method: str, tmp_path: Path):
    adapter = trained(tmp_path / "in", METHODS[method]())
    base = tiny.base_model("llama")
    report = to_lora(base, tmp_path / "in", tmp_path / "out", rank=FULL, inputs=tiny.batch("llama", labels=False))
    assert report.route == ("peft" if method in BY_PEFT else "difference")
    assert {m.path.rpartition(".")[2] for m in report.modules} == set(LINEARS)
    assert max(report.weight_error, report.output_error, report.model_error or 0) < NOTHING
    assert relative(molora.load(base, tmp_path / "out").eval(), adapter) < NOTHING


@pytest.mark.parametrize("method", ["miss", "lokr", "vera", "dora", "pissa", "oft", "ia3"])
def test_the_reported_errors_are_the_measured_ones(method: str, tmp_path: Path):
    adapter = trained(tmp_path / "in", METHODS[method]())
    base = tiny.base_model("llama")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    state = torch.random.get_rng_state()
    report = to_lora(base, tmp_path / "in", tmp_path / "out", rank=3, inputs=tiny.batch("llama", labels=False))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in base.state_dict().items())
    merged, theirs = molora.load(base, tmp_path / "out").merge_and_unload(), adapter.merge_and_unload()
    weights = {m.path: m for m in report.modules}
    off = size = 0.0
    for path, m in weights.items():
        change = theirs.get_submodule(path).weight - before[f"{path}.weight"]
        apart = merged.get_submodule(path).weight - theirs.get_submodule(path).weight
        assert m.rank == 3
        assert m.weight_error == pytest.approx(float((apart.norm() / change.norm()).detach()), abs=SAME)
        off, size = off + float(apart.detach().square().sum()), size + float(change.detach().square().sum())
    assert report.weight_error == pytest.approx((off / size) ** 0.5, abs=SAME)
    assert 0.01 < report.weight_error < 1
    assert report.model_error == pytest.approx(relative(merged, theirs), abs=SAME)


def test_truncation_is_the_nearest_lora_and_more_rank_is_nearer(tmp_path: Path):
    adapter = trained(tmp_path / "in", METHODS["dora"]()).merge_and_unload()
    base = tiny.base_model("llama")
    errors = [to_lora(base, tmp_path / "in", tmp_path / str(r), rank=r) for r in (1, 4, 8)]
    path = errors[0].modules[0].path
    change = adapter.get_submodule(path).weight - base.get_submodule(path).weight
    values = torch.linalg.svdvals(change).square()
    for report, r in zip(errors, (1, 4, 8), strict=True):
        assert report.modules[0].weight_error == pytest.approx(float(values[r:].sum() / values.sum()) ** 0.5, abs=SAME)
    assert errors[0].output_error > errors[1].output_error > errors[2].output_error


def test_a_share_takes_the_fewest_ranks_that_keep_it(tmp_path: Path):
    trained(tmp_path / "in", METHODS["dora"]())
    report = to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=0.9)
    assert all(m.weight_error**2 <= 0.1 for m in report.modules)
    fewer = {m.path: m.rank - 1 for m in report.modules}
    for r in sorted(set(fewer.values()) - {0}):
        less = to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "less", rank=r)
        assert all(m.weight_error**2 > 0.1 for m in less.modules if fewer[m.path] == r)


@pytest.mark.parametrize("method", ["dora", "vera"])
def test_a_base_of_conv1d_and_one_in_bfloat16(method: str, tmp_path: Path):
    make = {
        "dora": lambda names: peft.LoraConfig(target_modules=names, use_dora=True),
        "vera": lambda names: peft.VeraConfig(target_modules=names, r=8),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it switches fan_in_fan_out on
        adapter = trained(tmp_path / "gpt2", make[method](GPT2), "gpt2")
        to_lora(tiny.base_model("gpt2"), tmp_path / "gpt2", tmp_path / "out", rank=FULL)
    assert relative(molora.load(tiny.base_model("gpt2"), tmp_path / "out").eval(), adapter, "gpt2") < NOTHING
    trained(tmp_path / "half", make[method](LINEARS), spread=1e-3)
    half = tiny.base_model("llama").to(torch.bfloat16)
    report = to_lora(half, tmp_path / "half", tmp_path / "small", rank=FULL)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert report.weight_error < NOTHING  # a change far below the weights' own rounding


def test_converted_adapters_are_experts(tmp_path: Path):
    folders = {}
    for method in ("dora", "miss"):
        trained(tmp_path / method, METHODS[method]())
        to_lora(tiny.base_model("llama"), tmp_path / method, tmp_path / f"{method}_lora", rank=8)
        folders[method] = str(tmp_path / f"{method}_lora")
    model = molora.convert(tiny.base_model("llama"), "meteora", adapters=folders, top_k=2).eval()
    assert tiny.output(model, tiny.batch("llama")).isfinite().all()
    assert model.get_submodule("model.layers.0.self_attn.q_proj").bank.ranks == (8, 4)  # MiSS at its own rank


@pytest.mark.parametrize("method", ["dora", "pissa", "loha"])
def test_convert_and_load_name_the_way(method: str, tmp_path: Path):
    trained(tmp_path, METHODS[method]())
    call = re.escape(f"molora.interop.to_lora.to_lora(base_model, {str(tmp_path)!r}, out_folder, rank=16)")
    with pytest.raises(AdapterError, match=call):
        molora.convert(tiny.base_model("llama"), "xlora", adapters={"math": str(tmp_path)})
    with pytest.raises(AdapterError, match=call):
        molora.load(tiny.base_model("llama"), tmp_path)
