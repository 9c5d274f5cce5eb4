"""What ``to_lora`` refuses, with the reason, before anything is written; and how its report reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import AdapterError, ConfigError, MoloraError
from molora.interop.conversion_report import ConversionReport, ModuleError
from molora.interop.to_lora import to_lora
from tests.interop.test_to_lora import ANY, METHODS, peft, trained
from tests.support import tiny
from tests.support.tolerances import close

CAUSAL = {"task_type": "CAUSAL_LM"}
LAYERS = "model.layers.0.self_attn"

NOT_A_CHANGE_OF_LINEARS = {
    "prompt_tuning": (lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3), "tokens in front"),
    "prefix_tuning": (lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3), "tokens in front"),
    "adaption_prompt": (
        lambda: peft.AdaptionPromptConfig(**CAUSAL, adapter_len=2, adapter_layers=1),
        "tokens in front",
    ),
    "norms": (lambda: peft.LNTuningConfig(), "layernorm.weight, which is no weight of a linear"),
    "a router of its own": (lambda: peft.LilyConfig(**ANY), "LILY cannot be merged into weights"),
    "routed by task": (lambda: peft.PolyConfig(**ANY), "POLY cannot be run on inputs alone"),
    "whole modules": (lambda: peft.LoKrConfig(**ANY, modules_to_save=["lm_head"]), "modules_to_save"),
    "embeddings": (
        lambda: peft.LoraConfig(target_modules=["embed_tokens"], init_lora_weights=False),
        "embed_tokens.weight, which is no weight of a linear",
    ),
    "random start": (lambda: peft.LoraConfig(**ANY, init_lora_weights="pissa_niter_2"), "does not record"),
}


@pytest.mark.parametrize("case", NOT_A_CHANGE_OF_LINEARS)
def test_what_is_no_change_of_linears_is_refused(case: str, tmp_path: Path):
    make, words = NOT_A_CHANGE_OF_LINEARS[case]
    trained(tmp_path / "in", make())
    with pytest.raises(AdapterError, match=words):
        to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)
    assert not (tmp_path / "out").exists()


def test_trained_biases_are_refused(tmp_path: Path):
    config = peft.LoraConfig(target_modules=["c_attn"], bias="lora_only", fan_in_fan_out=True)
    trained(tmp_path / "in", config, "gpt2")
    with pytest.raises(AdapterError, match=r"c_attn\.bias, which is no weight"):
        to_lora(tiny.base_model("gpt2"), tmp_path / "in", tmp_path / "out", rank=4)


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga", "pissa_niter_16"])
def test_a_residual_that_the_folder_does_not_determine_is_refused(start: str, tmp_path: Path):
    trained(tmp_path / "in", METHODS["lora"]())
    rewrite(tmp_path / "in", init_lora_weights=start)
    for call in (
        lambda: to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4),
        lambda: molora.load(tiny.base_model("llama"), tmp_path / "in"),
    ):
        with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
            call()


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_way_named_for_such_a_residual_works(tmp_path: Path):
    """PEFT's own conversion needs the start, saved before training; it gives plain LoRA of twice the rank."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.base_model("llama"), peft.LoraConfig(**ANY, init_lora_weights="pissa_niter_2"))
    model.save_pretrained(tmp_path / "start")
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn(p.shape))
    expected = tiny.output(model.eval(), tiny.batch("llama"))
    model.save_pretrained(tmp_path / "end", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = molora.load(tiny.base_model("llama"), tmp_path / "end").eval()
    close(tiny.output(ours, tiny.batch("llama")), expected, "merged_fp32")


def test_an_adapter_of_another_base_or_with_tensors_missing_is_refused(tmp_path: Path):
    trained(tmp_path / "in", METHODS["dora"]())
    with pytest.raises(AdapterError, match="PEFT cannot put it on this BertFor"):
        to_lora(tiny.base_model("bert"), tmp_path / "in", tmp_path / "out", rank=4)
    with pytest.raises(AdapterError, match="do not fit this LlamaModel"):
        to_lora(tiny.base_model("llama").model, tmp_path / "in", tmp_path / "out", rank=4)
    tensors = load_file(tmp_path / "in" / "adapter_model.safetensors")
    lost = next(k for k in tensors if "magnitude" in k)
    save_file({k: v for k, v in tensors.items() if k != lost}, tmp_path / "in" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="missing .*lora_magnitude_vector"):
        to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)


def test_an_untrained_adapter_and_no_numbers_are_refused(tmp_path: Path):
    trained(tmp_path / "in", peft.LoraConfig(**ANY), spread=0.0)
    with pytest.raises(AdapterError, match="changes no weight"):
        to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)
    trained(tmp_path / "nan", METHODS["dora"](), spread=float("nan"))
    with pytest.raises(AdapterError, match="NaN or infinite"):
        to_lora(tiny.base_model("llama"), tmp_path / "nan", tmp_path / "out", rank=4)


def test_a_torn_file_is_refused_before_peft_reads_it(tmp_path: Path):
    trained(tmp_path / "in", METHODS["dora"]())
    path = tmp_path / "in" / "adapter_model.safetensors"
    raw = path.read_bytes()
    for torn in (raw[:-3], raw[:40], b"", b"x" * 100):
        path.write_bytes(torn)
        with pytest.raises(AdapterError, match="expected a whole safetensors file"):
            to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)
    path.unlink()
    path.mkdir()
    with pytest.raises(AdapterError, match="expected a plain file"):
        to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)


def quantised() -> Any:
    """A base with one linear that holds integers, as every quantiser's does."""
    model = tiny.base_model("llama")
    model.get_submodule(LAYERS).q_proj.weight = torch.nn.Parameter(torch.ones(32, 32, dtype=torch.int8), False)
    return model


BASES = {
    "quantised": (quantised, "quantised base .*q_proj.*unquantised for this step"),
    "converted": (lambda: molora.convert(tiny.base_model("llama"), "lora"), "call model.unload"),
    "empty": (lambda: tiny.base_model("llama").to("meta"), "meta device"),
}


@pytest.mark.parametrize("case", BASES)
def test_a_base_that_cannot_tell_the_difference_is_refused(case: str, tmp_path: Path):
    trained(tmp_path / "in", METHODS["dora"]())
    make, words = BASES[case]
    with pytest.raises(ConfigError, match=words):
        to_lora(make(), tmp_path / "in", tmp_path / "out", rank=4)


@pytest.mark.parametrize("rank", [0, -1, True, 1.5, 0.0, float("nan"), "8", None])
def test_a_rank_out_of_range_is_refused(rank: Any, tmp_path: Path):
    with pytest.raises(ConfigError, match="rank: got"):
        to_lora(tiny.base_model("llama"), tmp_path, tmp_path / "out", rank=rank)


def test_inputs_that_the_base_cannot_run_are_refused(tmp_path: Path):
    trained(tmp_path / "in", METHODS["dora"]())
    for inputs in ({}, {"input_ids": torch.tensor([[999]])}):
        with pytest.raises(ConfigError, match="inputs: the base cannot run them"):
            to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4, inputs=inputs)


def test_folders_that_are_none_or_the_same_are_refused(tmp_path: Path):
    base = tiny.base_model("llama")
    trained(tmp_path / "in", METHODS["dora"]())
    with pytest.raises(ConfigError, match="the adapter's own"):
        to_lora(base, tmp_path / "in", tmp_path / "x" / ".." / "in", rank=4)
    with pytest.raises(AdapterError, match="no adapter_config.json"):
        to_lora(base, tmp_path / "nowhere", tmp_path / "out", rank=4)
    (tmp_path / "in" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="no adapter_model.safetensors"):  # a pickle would be read by PEFT
        to_lora(base, tmp_path / "in", tmp_path / "out", rank=4)


def test_a_layer_that_is_not_its_merged_weight_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained(tmp_path / "in", METHODS["lokr"]())
    layer = peft.tuners.lokr.layer.Linear
    plain = layer.forward
    monkeypatch.setattr(layer, "forward", lambda self, x: plain(self, x).relu())
    with pytest.raises(AdapterError, match="other outputs than its merged weight"):
        to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)


def test_without_peft_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained(tmp_path / "in", METHODS["dora"]())
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(MoloraError, match=r"pip install 'molora\[peft\]'"):
        to_lora(tiny.base_model("llama"), tmp_path / "in", tmp_path / "out", rank=4)


def test_the_report_as_a_table():
    a = ModuleError("layers.0.q", 4, weight_off=1.0, weight_size=4.0, output_off=9.0, output_size=36.0)
    b = ModuleError("layers.1.q", 2, weight_off=0.0, weight_size=12.0, output_off=0.0, output_size=0.0)
    report = ConversionReport("in", "LOKR", "peft", (a, b), model_error=0.125)
    assert (a.weight_error, report.weight_error, b.output_error, report.output_error) == (0.5, 0.25, 0.0, 0.5)
    lines = str(report).splitlines()
    assert lines[2].split() == ["layers.0.q", "4", "5.00e-01", "5.00e-01"]
    assert lines[4].split() == ["all", "modules", "4", "2.50e-01", "5.00e-01"]
    assert lines[5].split() == ["output", "of", "the", "model", "1.25e-01"]
    assert len({len(line) for line in lines[1:]}) == 1
