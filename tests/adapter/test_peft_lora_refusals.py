"""PEFT LoRA folders made by hand: names and prefixes, and everything that is not plain LoRA is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from molora.adapter.peft_lora import LoraAdapter, align, read_peft_lora
from molora.errors import AdapterError


def write(folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A PEFT LoRA folder by hand: one linear from 3 to 5 of rank 2, changed as told."""
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "target_modules": ["q"], "use_rslora": False}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **(config or {})}))
    save_file(tensors or matrices(), folder / "adapter_model.safetensors")
    return folder


def matrices(path: str = "base_model.model.layers.0.q", infix: str = "", r: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A{infix}.weight": torch.ones(r, 3), f"{path}.lora_B{infix}.weight": torch.ones(5, r)}


@pytest.mark.parametrize(
    ("key", "infix", "path"),
    [
        ("base_model.model.layers.0.q", "", "layers.0.q"),
        ("base_model.model.layers.0.q", ".default", "layers.0.q"),
        ("base_model.model.default.0.q", "", "default.0.q"),
        ("base_model.model.default", ".default", "default"),
        ("base_model.model.q_default", "", "q_default"),
        ("layers.0.q", "", "layers.0.q"),
        ("base_model.model.base_model.model.q", "", "base_model.model.q"),
    ],
)
def test_names_lose_pefts_prefix_and_a_saved_adapter_name(key: str, infix: str, path: str, tmp_path: Path):
    adapter = read_peft_lora(write(tmp_path, tensors=matrices(key, infix)))
    assert list(adapter.modules) == [path]
    assert adapter.modules[path][2] == 3.0


def test_an_unknown_adapter_name_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="lora_A.other"):
        read_peft_lora(write(tmp_path, tensors=matrices(infix=".other")))


def test_the_base_name_and_missing_entries_have_pefts_defaults(tmp_path: Path):
    folder = write(tmp_path, {"base_model_name_or_path": "org/base"}, matrices(r=8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    adapter = read_peft_lora(folder)
    assert adapter.base_model_name == "org/base"
    assert adapter.modules["layers.0.q"][2] == 1.0  # PEFT's r and lora_alpha are 8


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "modules_to_save"),
    "target_parameters": ({"target_parameters": ["experts.up"]}, "target_parameters"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "activated_lora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "switch_of_the_future": ({"use_quantum": True}, "use_quantum"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
    "other_type": ({"peft_type": "LOHA"}, "'LOHA'"),
    "no_type": ({"peft_type": None}, "expected 'LORA'"),
    "rank_differs": ({"r": 4}, "rank 2"),
    "rank_is_bool": ({"r": True}, "r=True"),
    "alpha_is_text": ({"lora_alpha": "16"}, "lora_alpha"),
    "rslora_is_text": ({"use_rslora": "yes"}, "use_rslora"),
    "pattern_is_list": ({"alpha_pattern": ["q"]}, "alpha_pattern"),
    "regex_rank": ({"rank_pattern": {".*q": 2}}, "regular expression"),
    "regex_alpha": ({"alpha_pattern": {"layers.[0-9]+.q": 2}}, "regular expression"),
    "catastrophic": ({"alpha_pattern": {"(a+)+$" * 40: 2}}, "regular expression"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_is_not_plain_lora_is_refused(case: str, tmp_path: Path):
    config, words = BAD_CONFIGS[case]
    with pytest.raises(AdapterError, match=re.escape(words)):
        read_peft_lora(write(tmp_path, config))


ONES = torch.ones(2, 3)
KEY = "base_model.model.q"
BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "alone": ({f"{KEY}.lora_A.weight": ONES}, "lora_A alone"),
    "embedding": ({f"{KEY}.lora_embedding_A": ONES}, "embedding"),
    "convolution": ({f"{KEY}.lora_A.weight": torch.ones(2, 3, 1, 1)}, "convolution"),
    "dora": (matrices() | {f"{KEY}.lora_magnitude_vector": ONES}, "DoRA"),
    "whole_module": (matrices() | {"base_model.model.classifier.weight": ONES}, "whole trained module"),
    "bias": (matrices() | {f"{KEY}.lora_B.bias": ONES}, "not a plain LoRA matrix"),
    "integers": ({f"{KEY}.lora_A.weight": ONES.long()}, "int64"),
    "ranks_differ": (matrices() | {"base_model.model.layers.0.q.lora_B.weight": torch.ones(5, 3)}, "(r, in)"),
    "twice": (matrices() | matrices(infix=".default"), "twice"),
    "nan": (matrices() | {f"{KEY}.lora_A.weight": ONES * math.nan}, "NaN"),
    "no_path": ({"lora_A.weight": ONES}, "lora_A.weight"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_weights_that_are_not_plain_lora_are_refused(case: str, tmp_path: Path):
    tensors, words = BAD_TENSORS[case]
    with pytest.raises(AdapterError, match=re.escape(words)):
        read_peft_lora(write(tmp_path, tensors=tensors))


def test_what_is_no_folder_of_peft_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="adapter_config.json"):
        read_peft_lora(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        read_peft_lora(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path):
    write(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="bytes of data"):
        read_peft_lora(tmp_path)


def test_a_pickle_needs_permission_and_holds_tensors_only(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(matrices(), tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="allow_pickle=True"):
        read_peft_lora(tmp_path)
    assert read_peft_lora(tmp_path, allow_pickle=True).modules["layers.0.q"][2] == 3.0
    torch.save({"q": Path("x")}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="plain tensors"):
        read_peft_lora(tmp_path, allow_pickle=True)
    torch.save(matrices() | {"step": 3}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="named tensors and nothing else"):
        read_peft_lora(tmp_path, allow_pickle=True)
    torch.save({k: v * math.nan for k, v in matrices().items()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="NaN"):
        read_peft_lora(tmp_path, allow_pickle=True)


def test_a_snapshot_of_the_hub_cache_is_readable_and_no_other_link(tmp_path: Path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        blob = blobs / f"{i}".rjust(40, "a")
        (write(tmp_path / "plain") / name).rename(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    assert read_peft_lora(snapshot).modules["layers.0.q"][2] == 3.0
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to(blobs / blob.name)
    with pytest.raises(AdapterError, match="link"):
        read_peft_lora(snapshot)


def lora(*names: str) -> LoraAdapter:
    modules = {n: (torch.ones(1, 1), torch.ones(1, 1), float(i)) for i, n in enumerate(names)}
    return LoraAdapter("here", modules, "org/base")


@pytest.mark.parametrize(
    ("names", "paths", "found"),
    [
        (["model.a.q", "model.b.q"], ["model.a.q", "model.b.q", "head"], ["model.a.q", "model.b.q"]),
        (["model.a.q", "model.b.q"], ["a.q", "b.q"], ["a.q", "b.q"]),
        (["a.q", "b.q"], ["model.a.q", "model.b.q", "model.c"], ["model.a.q", "model.b.q"]),
        (["a.q", "b.q"], ["x.y.a.q", "x.y.b.q", "z.a.q"], ["x.y.a.q", "x.y.b.q"]),
        (["q"], ["layers.q"], ["layers.q"]),
    ],
)
def test_align_adds_or_cuts_one_prefix(names: list[str], paths: list[str], found: list[str]):
    aligned = align(lora(*names), paths)
    assert list(aligned) == found
    assert [m[2] for m in aligned.values()] == list(range(len(names)))


@pytest.mark.parametrize(
    ("names", "paths", "words"),
    [
        (["model.a.q"], ["model.a.p"], "shares no module"),
        (["model.a.q"], ["model.a.p"], "model.a.p"),
        (["model.a.q"], ["a.q", "q"], "alike"),
        (["a.q"], ["x.a.q", "y.a.q"], "alike"),
        (["a.q", "b.q"], ["x.a.q", "y.b.q"], "shares no module"),
        (["a.q", "b.q"], ["a.q"], "1 modules too many: got b.q"),
        (["ba.q"], ["a.q"], "shares no module"),
    ],
)
def test_align_refuses_what_does_not_fit_as_a_whole(names: list[str], paths: list[str], words: str):
    with pytest.raises(AdapterError, match=words):
        align(lora(*names), paths)
