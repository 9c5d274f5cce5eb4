"""Folders of MixLoRA, MoLA, MeteoRA and the xlora package: loaded, they compute their papers' equations."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import ConfigError
from molora.interop.foreign import read_config
from molora.interop.importers import IMPORTERS, importer_of
from tests.forward.test_formulas_two_pass import LINEARS, gate, mixed
from tests.support import foreign_folders as write
from tests.support import foreign_oracles as oracle
from tests.support.places import FIXTURES
from tests.support.tiny import base_model
from tests.support.tolerances import close

BASE = {"input_ids": oracle.IDS}


def check(model: Any, expected: torch.Tensor, tmp_path: Path) -> None:
    """Same logits as the equations, armed, frozen, and the same again from molora's own folder."""
    with torch.no_grad():
        got = model.eval()(**BASE).logits
        assert (got - base_model("llama")(**BASE).logits).abs().max() > 0.05, "the experts do nothing"
    close(got, expected, "same_math_fp32")
    assert not any(p.requires_grad for p in model.parameters())
    model.save_pretrained(tmp_path / "own")
    with torch.no_grad():
        assert torch.equal(molora.load(base_model("llama"), tmp_path / "own").eval()(**BASE).logits, got)


# ---- MixLoRA ----

MIXLORA: dict[str, dict[str, Any]] = {
    "current": {},
    "first_releases": {"old": True},
    "expert_lora": {"attention_r": 4, "config": {"r": 4, "lora_alpha": 2, "expert_lora": {"r": 2, "lora_alpha": 9}}},
    "rslora": {"config": {"use_rslora": True}},
    "one_choice": {"config": {"top_k": 1}},
    "top_p": {"config": {"routing_strategy": "mixlora-dynamic", "top_p": 0.8, "temperature": 0.0}},
}


@pytest.mark.parametrize("case", MIXLORA)
def test_mixlora(case: str, tmp_path: Path):
    own = dict(MIXLORA[case])
    old = own.get("old", False)
    config = write.mixlora_config(**{"routing_strategy": "mixtral" if old else "mixlora", **own.pop("config", {})})
    tensors = write.mixlora(**own)
    write.write(tmp_path / "foreign", config, tensors, "adapter_model.bin")
    model = molora.load(base_model("llama"), tmp_path / "foreign", allow_pickle=True)
    experts = {**config, **config.get("expert_lora", {})}
    root = math.sqrt if config.get("use_rslora") else float
    scales = [c["lora_alpha"] / root(c["r"]) for c in (experts, config)]

    def top_p(p: torch.Tensor) -> torch.Tensor:
        """Experts in falling order until their sum passes 0.8, not renormalised."""
        values, ids = p.sort(-1, descending=True)
        before = values.cumsum(-1) - values
        return torch.zeros_like(p).scatter(-1, ids, values * (before <= 0.8))

    weights = top_p if case == "top_p" else (lambda p: oracle.top(p, config["top_k"]))
    check(model, oracle.mixlora(tensors, weights, *scales, write.OLD if old else {}), tmp_path)
    mixture = model._molora.config
    assert (mixture.recipe, mixture.released) == ("mixlora", True)
    assert mixture.target_modules == tuple(sorted(config["target_modules"]))
    assert mixture.placements[0].lora_dropout == 0.05


def test_mixlora_on_the_down_projection_and_attention_of_one_layer(tmp_path: Path):
    """Routers of blocks whose leading linear has no experts; modules that name endings alone would not pick."""
    keep = ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.mlp.moe_gate")
    tensors = {k: t for k, t in write.mixlora().items() if any(n in k for n in keep)}
    write.write(tmp_path / "foreign", write.mixlora_config(), tensors, "adapter_model.safetensors")
    model = molora.load(base_model("llama"), tmp_path / "foreign")
    assert model._molora.config.target_modules == ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")
    gone = {k: torch.zeros_like(t) if "lora_B" in k and k not in tensors else t for k, t in write.mixlora().items()}
    check(model, oracle.mixlora(gone, lambda p: oracle.top(p, 2), 3.0, 3.0, {}), tmp_path)


@pytest.mark.parametrize("own", [{"use_dora": True}, {"expert_lora": {"use_dora": True}}])
def test_mixdora_is_read_as_the_lora_in_it_with_a_warning(own: dict[str, Any], tmp_path: Path):
    tensors = write.mixlora()
    write.write(tmp_path / "foreign", write.mixlora_config(act_fn="swish", **own), tensors, "adapter_model.bin")
    with pytest.warns(UserWarning, match="magnitudes"):
        model = molora.load(base_model("llama"), tmp_path / "foreign", allow_pickle=True)
    check(model, oracle.mixlora(tensors, lambda p: oracle.top(p, 2), 3.0, 3.0, {}), tmp_path)


# ---- MoLA ----


@pytest.mark.parametrize("top_k", [2, (1, 3)])
def test_mola(top_k: Any, tmp_path: Path):
    tensors = write.mola()
    write.write(tmp_path / "foreign", write.mola_config(), tensors, "adapter_model.bin")
    model = molora.load(base_model("llama"), tmp_path / "foreign", allow_pickle=True, top_k=top_k)
    check(model, oracle.mola(tensors, (2, 2) if top_k == 2 else top_k, alpha=5), tmp_path)
    placement = model._molora.config.placements[0]
    assert (placement.num_experts, placement.r) == (write.MOLA_EXPERTS, write.MOLA_RANKS)
    assert (placement.balance[0].pooling, placement.balance[0].scope) == ("layer", "batch")


# ---- MeteoRA ----


@pytest.mark.parametrize("temperature", [1.0, 15.0])
@pytest.mark.parametrize("shards", [1, 2])
def test_meteora(shards: int, temperature: float, tmp_path: Path):
    tensors = write.meteora()
    for i in range(shards):
        part = dict(list(tensors.items())[i::shards])
        name = "model.safetensors" if shards == 1 else f"model-0000{i + 1}-of-00002.safetensors"
        write.write(tmp_path / "top_2", None, part, name)
    more = {"top_k": 2} if temperature == 1 else {"top_k": 2, "temperature": temperature}
    named = molora.load(base_model("llama"), tmp_path / "top_2", adapters=["b", "a", "c"], lora_alpha=5.0, **more)
    check(named, oracle.meteora(tensors, 2, temperature, [2.5, 2.5, 2.5]), tmp_path)
    assert [n for n, _ in named._molora.config.adapters] == ["b", "a", "c"]
    folders = write.loras(tmp_path / "loras", {"x": 2, "a": 2, "m": 2})
    model = molora.load(base_model("llama"), tmp_path / "top_2", adapters=folders, **more)
    check(model, oracle.meteora(tensors, 2, temperature, [3.0, 3.5, 4.0]), tmp_path / "second")


# ---- the xlora package ----

XLORA: dict[str, dict[str, Any]] = {
    "latest": {"slots": ["inner.0", "last"]},
    "depth_3": {"slots": ["inner.0", "inner.3", "last"], "config": {"xlora_depth": 3}},
    "depth_1_pickle": {"slots": ["last"], "config": {"xlora_depth": 1}, "pickle": True},
    "one_gate_for_all_modules": {"slots": ["inner.0", "last"], "config": {"layerwise_scalings": False}},
    "no_bias": {"slots": ["inner.0", "last"], "bias": False, "config": {"use_bias": False}},
    "linears_alone": {
        "slots": ["inner.0", "inner.1", "last"],
        "config": {"xlora_depth": 3, "enable_relu_and_dropout": False},
    },
    "top_k": {"slots": ["inner.0", "last"], "config": {"top_k_lora": 1}},
    "trained_experts_of_first_releases": {"slots": ["inner.0", "last"], "place": "adapters"},
    "scaling_pass_value": {"slots": ["inner.0", "last"], "config": {"scaling_pass_value": 0.3}},
}


def xlora_oracle(tensors: Any, slots: list[str], config: dict[str, Any], folders: dict[str, Path]) -> torch.Tensor:
    """arXiv 2402.07148 sec. II: the head on the scaling pass's hidden state, its gates on every linear's experts."""
    files = {n: (load_file(f / "adapter_model.safetensors"), json.loads((f / "adapter_config.json").read_text()))
             for n, f in folders.items()}  # fmt: skip
    experts = {
        p: [
            tuple(t[f"base_model.model.{p}.lora_{x}.weight"] for x in "AB") + (c["lora_alpha"] / c["r"],)
            for t, c in files.values()
        ]
        for p in LINEARS
    }
    base, E, factor = base_model("llama"), len(folders), config["global_scaling_weight"]
    constant = torch.full((*oracle.IDS.shape, E), float(config["scaling_pass_value"]))
    with torch.no_grad(), mixed(base, experts, lambda m: constant, factor):
        h = base.model(**BASE).last_hidden_state
    for i, slot in enumerate(slots):
        h = torch.relu(h) if i and config["enable_relu_and_dropout"] else h
        h = h @ tensors[f"{slot}.weight"].t() + tensors.get(f"{slot}.bias", 0)
    wide = config["layerwise_scalings"]
    own = {k: v for k, v in config.items() if v is not None}
    with torch.no_grad(), mixed(base, experts, lambda m: gate(h[..., E * m : E * (m + 1)] if wide else h, own), factor):
        return base(**BASE).logits


@pytest.mark.parametrize("case", XLORA)
def test_xlora(case: str, tmp_path: Path):
    own = XLORA[case]
    config = write.xlora_config(**own.get("config", {}))
    head = write.xlora_head(own["slots"], 28 if config["layerwise_scalings"] else 2, own.get("bias", True))
    folder = tmp_path / "foreign"
    place = folder / own.get("place", "")
    write.write_xlora(folder, place, config, head, own.get("pickle", False))
    model = molora.load(base_model("llama"), folder, allow_pickle=True)
    folders = {"math": place / "math", "code": place / "code"}
    check(model, xlora_oracle(head, own["slots"], config, folders), tmp_path)
    assert [n for n, _ in model._molora.config.adapters] == ["math", "code"]


def test_xlora_as_it_was_first_published(tmp_path: Path):
    """X-LoRA/ beside X-LoRA_adapters/, experts by the last part of a path on a hub, and no scaling pass value."""
    adapters = {"math": "org/x-lora/X-LoRA_adapters/1/", "code": "org/x-lora/X-LoRA_adapters/2/"}
    config = {k: v for k, v in write.xlora_config(adapters=adapters).items() if k != "scaling_pass_value"}
    slots = ["inner.0", "last"]
    head = write.xlora_head(slots, 28)
    write.write_xlora(tmp_path / "hub" / "X-LoRA", tmp_path / "made", config, head)
    folders = {"math": tmp_path / "hub" / "X-LoRA_adapters" / "1", "code": tmp_path / "hub" / "X-LoRA_adapters" / "2"}
    for name, place in folders.items():
        place.parent.mkdir(exist_ok=True)
        (tmp_path / "made" / name).rename(place)
    model = molora.load(base_model("llama"), tmp_path / "hub", scaling_pass_value=0.5)
    check(model, xlora_oracle(head, slots, {**config, "scaling_pass_value": 0.5}, folders), tmp_path)
    swapped = dict(reversed(folders.items()))
    again = molora.load(base_model("llama"), tmp_path / "hub" / "X-LoRA", scaling_pass_value=0.5, adapters=swapped)
    check(again, xlora_oracle(head, slots, {**config, "scaling_pass_value": 0.5}, folders), tmp_path / "again")


def test_adapters_of_other_names_come_in_the_given_order(tmp_path: Path):
    head = write.xlora_head(["inner.0", "last"], 28)
    write.write_xlora(tmp_path / "x", tmp_path / "made", write.xlora_config(), head)
    given = {"sums": tmp_path / "made" / "math", "python": tmp_path / "made" / "code"}
    model = molora.load(base_model("llama"), tmp_path / "x", adapters=given)
    check(model, xlora_oracle(head, ["inner.0", "last"], write.xlora_config(), given), tmp_path)
    assert [n for n, _ in model._molora.config.adapters] == ["sums", "python"]
    with pytest.raises(ConfigError, match=r"got 1 \(sums\), but .* mixes 2 \(math, code\)"):
        molora.load(base_model("llama"), tmp_path / "x", adapters={"sums": given["sums"]})
    with pytest.raises(ConfigError, match="expected .name: PEFT LoRA folder"):
        molora.load(base_model("llama"), tmp_path / "x", adapters={"sums": 1, "python": 2})


def test_a_softmax_over_the_whole_batch_is_told(tmp_path: Path):
    config = write.xlora_config(top_k_lora=2, enable_softmax_topk=True, enable_softmax=False)
    write.write_xlora(tmp_path, tmp_path, config, write.xlora_head(["inner.0", "last"], 28))
    with pytest.warns(UserWarning, match="for each token"):
        molora.load(base_model("llama"), tmp_path)


# ---- the table ----


def test_each_folder_is_of_one_format(tmp_path: Path):
    write.write(tmp_path / "MixLoRA and MoE-PEFT", write.mixlora_config(), write.mixlora(), "adapter_model.bin")
    of_moe_peft = tmp_path / "MoE-PEFT's MoLA and LoRAMoE"
    write.write(of_moe_peft, write.moe_peft_config("mola"), write.moe_peft("mola"), "adapter_model.bin")
    write.write(tmp_path / "MoLA", write.mola_config(), write.mola(), "adapter_model.bin")
    write.write(tmp_path / "MeteoRA", None, write.meteora(), "model.safetensors")
    write.write_xlora(tmp_path / "xlora", tmp_path / "loras", write.xlora_config(), write.xlora_head(["last"], 2))
    write.loras(tmp_path, {"PEFT LoRA": 2})
    (tmp_path / "PEFT X-LoRA").mkdir()
    (tmp_path / "PEFT X-LoRA" / "adapter_config.json").write_text('{"peft_type": "XLORA"}')
    for name in IMPORTERS:
        config = read_config(tmp_path / name / "adapter_config.json")
        assert [n for n, own in IMPORTERS.items() if own.recognises(tmp_path / name, config)] == [name]
    assert importer_of(FIXTURES / "format_1") is None
    assert importer_of(tmp_path / "nothing") is None
    save_file({"model.embed.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert importer_of(tmp_path / "loras") is IMPORTERS["PEFT LoRA"]
