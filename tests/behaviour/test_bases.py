"""Bases with something special: packed weights, experts of their own, weights that are read, recurrent states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import molora
from molora.errors import AdapterError, ConfigError, TargetError
from tests.support import behaviours, tiny
from tests.support.families import base, inputs
from tests.support.tolerances import close
from tests.support.works import options

RECIPES = [pytest.param(r, id=r) for r in molora.RECIPES]


class Sealed(nn.Module):
    """A linear that can be called, and cannot be read, copied or saved."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.call = [linear.requires_grad_(False)]

    def forward(self, x: Tensor) -> Tensor:
        return self.call[0](x)

    @property
    def weight(self) -> Tensor:
        raise AssertionError("the weight was read")

    def __deepcopy__(self, memo: Any) -> Sealed:
        raise AssertionError("the layer was copied")

    def _save_to_state_dict(self, *args: Any) -> None:
        raise AssertionError("the weight was saved")


def sealed() -> Any:
    model = tiny.base_model("llama")
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in path:
            model.set_submodule(path, Sealed(module))
    return model


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_frozen_linear_is_called_and_nothing_else(recipe: str, tmp_path: Path) -> None:
    model, batch = sealed(), tiny.batch("llama")
    expected = tiny.output(model, batch)
    molora.convert(model, recipe, **behaviours.options(recipe, "llama"))
    ours = tiny.output(tiny.arm(model), batch)
    behaviours.train_step(model, batch)
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(tiny.output(molora.load(sealed(), tmp_path), batch), ours)
    assert torch.equal(tiny.output(model.unload(), batch), expected)


@pytest.mark.parametrize("packed", ["torchao_int8", "hqq", "gguf"])
def test_nothing_is_merged_into_packed_weights(packed: str) -> None:
    model = tiny.arm(molora.convert(base(packed), "lora", r=4))
    before = tiny.output(model, inputs(packed))
    with pytest.raises(AdapterError, match="cannot merge into a .*; only plain float linears"):
        model.merge_and_unload()
    assert torch.equal(tiny.output(model, inputs(packed)), before)


# ------------------------------------------------------------------------------------------------ experts of the base


@pytest.mark.parametrize("name", ["experts", "gate_up_proj", "mlp"])
def test_fused_experts_that_are_named_are_refused(name: str) -> None:
    model = base("mixtral")
    before = behaviours.snapshot(model)
    with pytest.raises(TargetError, match=f"{name}.*experts are fused into parameters of three dimensions"):
        molora.convert(model, "mola", target_modules=["q_proj", name])
    assert behaviours.snapshot(model) == before


def adapted(family: str) -> set[str]:
    """The adapted linears of a layer, without the layer's own path."""
    sites = molora.convert(base(family), "lora")._molora.sites
    return {s.path.split(".", 3)[-1] for s in sites}


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"{name}_proj" for name in ("gate", "up", "down")}
DELTA = {f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")}


def test_the_router_and_the_experts_of_a_base_stay_as_they_are() -> None:
    assert adapted("mixtral") == adapted("qwen3_moe") == adapted("gpt_oss") == ATTENTION
    shared = {f"mlp.shared_expert.{name}" for name in MLP}
    assert adapted("qwen3_next") == ATTENTION | DELTA | shared
    latent = {f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")}
    assert adapted("deepseek") == latent | {f"mlp.{n}" for n in MLP} | {f"mlp.shared_experts.{n}" for n in MLP}


# ------------------------------------------------------------------------------------------ weights that are only read


def test_a_linear_whose_weight_is_read_and_never_called_is_left_out(tmp_path: Path) -> None:
    """Mamba multiplies by ``dt_proj.weight``: experts on the module would do nothing."""
    assert adapted("mamba") == {"mixer.in_proj", "mixer.x_proj", "mixer.out_proj"}
    with pytest.raises(TargetError, match=r"dt_proj: the model reads this Linear's weight and never calls it"):
        molora.convert(base("mamba"), "lora", target_modules=["dt_proj"])
    widths = {"in_proj": (32, 128), "dt_proj": (2, 64)}
    folders = {str(seed): str(lora_folder(tmp_path / str(seed), widths, seed)) for seed in (1, 2)}
    with pytest.raises(TargetError, match=r"dt_proj: the model reads"):
        molora.convert(base("mamba"), "meteora", adapters=folders)
    model = molora.convert(base("mamba"), "meteora", adapters=folders, exclude_modules=["dt_proj"])
    assert [s.path for s in model._molora.sites] == ["backbone.layers.0.mixer.in_proj"]


def lora_folder(folder: Path, widths: dict[str, tuple[int, int]], seed: int) -> Path:
    """A PEFT LoRA folder for modules of the first layer of a Mamba."""
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (i, o) in widths.items():
        path = f"base_model.model.backbone.layers.0.mixer.{name}"
        tensors[f"{path}.lora_A.weight"] = torch.randn(2, i, generator=g)
        tensors[f"{path}.lora_B.weight"] = torch.randn(o, 2, generator=g)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": list(widths), "bias": "none"}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# --------------------------------------------------------------------------------------------- two passes, two states


def test_a_recurrent_state_of_the_base_s_own_kind_is_refused_by_a_two_pass_model() -> None:
    """Both passes would go on from the one state; the base may."""
    model, ids = molora.convert(base("rwkv"), "xlora", **options("xlora", "rwkv")), inputs("rwkv")["input_ids"]
    with torch.no_grad():
        state = model(input_ids=ids[:, :4], use_cache=True).state
        with pytest.raises(ConfigError, match="state: got a recurrent state"):
            model(input_ids=ids[:, 4:], state=state, use_cache=True)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_a_recurrent_cache_that_the_base_filled_is_refused(family: str) -> None:
    model, ids = molora.convert(base(family), "xlora", **options("xlora", family)), inputs(family)["input_ids"]
    name = "cache_params" if family == "mamba" else "past_key_values"
    with torch.no_grad():
        with model.disable_adapter():
            cache = model(input_ids=ids[:, :4], use_cache=True)[name]
        with pytest.raises(ConfigError, match="that another model or the base filled"):
            model(input_ids=ids[:, 4:], use_cache=True, **{name: cache})


def test_a_cache_out_of_a_tuple_has_both_halves() -> None:
    model, ids = behaviours.shared("xlora", "llama"), tiny.batch("llama")["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        _, cache = model(input_ids=ids[:, :4], use_cache=True, return_dict=False)
        after = model(input_ids=ids[:, 4:], past_key_values=cache).logits
    close(after, whole[:, 4:], "same_math_fp32")


def test_a_backbone_without_a_hidden_state_is_refused() -> None:
    """One tower of two is one stream, but there is no state to compute the gates from."""
    text = options("xlora", "clip") | {"target_modules": r"text_model\..*"}
    model = molora.convert(base("clip"), "xlora", **text)
    with pytest.raises(ConfigError, match="no last_hidden_state"):
        tiny.output(model, inputs("clip"))


@pytest.mark.parametrize("same", [True, False])
def test_what_a_module_keeps_has_to_be_the_same_after_both_passes(same: bool) -> None:
    """A notice that both passes write alike may stay; a state may not, since generation would go on from one of two."""
    model, ids = behaviours.armed("xlora", "llama"), tiny.batch("llama")["input_ids"]

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        module.kept = torch.ones(2) if same else out.detach()

    model.model.layers[0].mlp.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        if same:
            model(input_ids=ids, use_cache=True)
        else:
            with pytest.raises(ConfigError, match=r"layers.0.mlp.kept: the base keeps a state.*use_cache=False"):
                model(input_ids=ids, use_cache=True)
