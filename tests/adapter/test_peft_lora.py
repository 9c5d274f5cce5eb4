"""PEFT LoRA folders: read and written without PEFT, compared with what the installed PEFT makes of them."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import molora
from molora.adapter.names import exact_pattern, first_match
from molora.adapter.peft_lora import LoraAdapter, align, read_peft_lora
from molora.adapter.peft_lora_writer import write_peft_lora
from molora.errors import CheckpointError
from tests.support import tiny
from tests.support.tolerances import close

peft = pytest.importorskip("peft", reason="the comparison is with PEFT itself, which the extra `peft` installs")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "mlp.down_proj": 6}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 32, "^model.layers.1.mlp.up_proj": 1}},
    "both_rslora": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5},
    },
    "first_pattern_wins": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"a_proj": 1, "v_proj": 2, "self_attn.v_proj": 3}},
    "all_linear": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    "one_layer": {"r": 2, "lora_alpha": 2, "layers_to_transform": [1]},
    "dot_is_any_letter": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"self.attn.q.proj": 32}},
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "dense"],
}


def peft_model(name: str, **options: Any) -> Any:
    """PEFT's LoRA with random A and B on a tiny model."""
    config = {"target_modules": TARGETS[name], "init_lora_weights": False, **options}
    config["fan_in_fan_out"] = name == "gpt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: patterns together with rsLoRA "might not be what you want"
        return peft.get_peft_model(tiny.base_model(name), peft.LoraConfig(**config)).eval()


def loaded_by_peft(name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above, and for Conv1D that it switches fan_in_fan_out on
        return peft.PeftModel.from_pretrained(tiny.base_model(name), folder).eval()


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's B A scale by module path, as (out, in)."""
    out = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").detach()
            out[path] = delta.t() if module.fan_in_fan_out else delta
    return out


CASES = [("llama", v) for v in VARIANTS] + [
    ("gpt2", "plain"),
    ("gpt2", "all_linear"),
    ("bert", "plain"),
    ("bert", "rslora"),
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_folder_of_peft_means_what_peft_computes(name: str, variant: str, tmp_path: Path):
    peft_model(name, **VARIANTS[variant]).save_pretrained(tmp_path)
    adapter = read_peft_lora(tmp_path)
    theirs = deltas(loaded_by_peft(name, tmp_path))  # saving sorts the patterns, so the saved model is no measure
    assert adapter.modules.keys() == theirs.keys()
    for path, (A, B, scale) in adapter.modules.items():
        close(scale * (B @ A), theirs[path], "peft_lora")
    ours = molora.load(tiny.base_model(name), tmp_path).eval()
    expected = tiny.output(loaded_by_peft(name, tmp_path), tiny.batch(name))
    close(tiny.output(ours, tiny.batch(name)), expected, "same_math_fp32")


PATTERNS = [
    "q", "layers.0.q", "0.q", "yers.0.q", "^layers.0.q", "^q", "layers.1.q", "layers.0.", "lay.rs.0.q", "^0.q",
    r"layers\.0\.q", r"lay\.rs.0.q",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", ["layers.0.q", "q", "model.layers.0.q", "x.layers.0.qq"])
def test_patterns_fit_as_in_peft(pattern: str, path: str):
    from peft.utils.other import get_pattern_key

    theirs = get_pattern_key([pattern], path)
    assert first_match([pattern], path, "here") == (pattern if re.match(rf"(.*\.)?({pattern})$", path) else None)
    assert (first_match([pattern], path, "here") or path) == theirs


def test_an_exact_pattern_fits_one_path():
    paths = ["a-b.0.q", "x.a-b.0.q", "a-bx0.q", "q"]
    assert [p for p in paths if first_match([exact_pattern("a-b.0.q")], p, "here")] == ["a-b.0.q"]


def test_an_adapter_fits_the_bare_backbone_and_back(tmp_path: Path):
    model = peft_model("llama", r=4)
    model.save_pretrained(tmp_path)
    adapter = read_peft_lora(tmp_path)
    head = tiny.base_model("llama")
    bare = [p for p, _ in head.model.named_modules()]
    moved = align(adapter, bare)
    assert set(moved) == {p.removeprefix("model.") for p in adapter.modules}
    back = align(LoraAdapter("here", moved, None), [p for p, _ in head.named_modules()])
    assert set(back) == set(adapter.modules)


def random_modules(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Modules of unequal rank and scale on a tiny model."""
    out = {}
    for i, (path, c) in enumerate(sorted(tiny.candidates(tiny.base_model(name)).items())):
        r = (2, 4, 4, 0)[i % 4]
        A, B = torch.randn(r, c.shape[0]), torch.randn(c.shape[1], r) * 0.2
        out[path] = (A, B, (2.0, 0.5, 16 / math.sqrt(8), 1.0)[i % 4])
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_an_export_computes_the_same_in_peft(name: str, tmp_path: Path):
    modules = random_modules(name)
    write_peft_lora(tmp_path, modules=modules, base_model_name="org/base")
    theirs = deltas(loaded_by_peft(name, tmp_path))
    assert theirs.keys() == {p for p, (A, _, _) in modules.items() if A.shape[0]}
    for path, delta in theirs.items():
        A, B, scale = modules[path]
        close(delta, scale * (B @ A), "peft_lora")
    ours = read_peft_lora(tmp_path).modules
    for path, (A, B, scale) in ours.items():
        assert torch.equal(A, modules[path][0])
        assert torch.equal(B, modules[path][1])
        assert scale == pytest.approx(modules[path][2], rel=1e-12)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.{p}.lora_{x}.weight" for p in ours for x in "AB"
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_export_load_in_peft_and_import_give_the_same_outputs(name: str, tmp_path: Path):
    ours = tiny.arm(molora.convert(tiny.base_model(name), "lora", r=4)).eval()
    ours.export_expert(0, tmp_path)
    theirs = loaded_by_peft(name, tmp_path)
    inputs = tiny.batch(name)
    expected = tiny.output(ours, inputs)
    assert (expected - tiny.output(tiny.base_model(name), inputs)).abs().max() > 0.05
    close(tiny.output(theirs, inputs), expected, "peft_lora")
    again = molora.load(tiny.base_model(name), tmp_path).eval()
    assert torch.equal(tiny.output(again, inputs), expected)


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path: Path):
    modules = random_modules("llama")
    write_peft_lora(tmp_path, modules=modules, base_model_name=None)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_peft_lora(tmp_path, modules=modules, base_model_name=None)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(CheckpointError, match="LOHA"):
        write_peft_lora(tmp_path, modules=modules, base_model_name=None)
    with pytest.raises(CheckpointError, match="rank 1"):
        write_peft_lora(
            tmp_path / "new", modules={"q": (torch.ones(0, 3), torch.ones(2, 0), 1.0)}, base_model_name=None
        )
    assert not (tmp_path / "new").exists()
