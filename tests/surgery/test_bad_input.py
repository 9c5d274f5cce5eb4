"""Bad input to ``convert`` gets one clear error of the right class, which names the remedy; the model is untouched.

What a converted model refuses in use is in test_bad_calls.py; files are in test_attacks.py and others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import molora
from molora.errors import AdapterError, ConfigError, MoloraError, TargetError
from tests.support.behaviours import snapshot
from tests.support.tiny import adapters, base_model, write_adapter
from tests.surgery.test_ffn_found import Toy

C, T, A = ConfigError, TargetError, AdapterError
# name: (recipe, options, error, what the message must say), on the tiny llama
Case = tuple[Any, dict[str, Any], type[MoloraError], str]

UNTAUGHT = {"router_aux_loss_coef": 0.0}
OPTIONS: dict[str, Case] = {
    "unknown recipe": ("mixlra", {}, C, "did you mean 'mixlora'"),
    "unknown option": ("mixlora", {"top_kk": 2}, C, "did you mean 'top_k'.*Known: num_experts"),
    "option of another recipe": ("lora", {"num_experts": 2}, C, "unknown option 'num_experts'"),
    "config and options": (molora.recipes.lora(), {"r": 4}, C, "give them to the recipe instead"),
    "text for a number": ("lora", {"r": "8"}, C, "r: got '8', expected int"),
    "true for a number": ("lora", {"r": True}, C, "r: got True, expected int"),
    "rank 0": ("lora", {"r": 0}, C, "r: got 0, expected a value of at least 1"),
    "rank of millions": ("lora", {"r": 10**9}, C, "expected a value of at most"),
    "negative alpha": ("lora", {"lora_alpha": -1}, C, "lora_alpha: got -1"),
    "alpha is not a number": ("lora", {"lora_alpha": float("nan")}, C, "lora_alpha: got nan"),
    "dropout 1": ("lora", {"lora_dropout": 1.0}, C, r"expected a value in \[0, 1\)"),
    "unknown start": ("lora", {"init_lora_weights": "lecun"}, C, "expected one of .*gaussian"),
    "start off the base": ("lora", {"init_lora_weights": "loftq"}, C, "replaces the base weight by a quantised one"),
    "unknown kernel": ("lora", {"kernel": "troch"}, C, "did you mean 'torch'"),
    "unknown scope": ("mola", {"balance_scope": "token"}, C, "'sequence', 'batch'"),
    "unknown routing": ("mixlora", {"routing": "topk"}, C, "expected one of top_k, top_p, switch"),
    "unknown allocation": ("mola", {"num_experts": "9999"}, C, "2468"),
    "no experts": ("mola", {"num_experts": ()}, C, "num_experts: got ()"),
    "top_k 0": ("mixlora", {"top_k": 0}, C, "top_k: got 0"),
    "top_k above the experts": ("mixlora", {"top_k": 9}, C, "top_k: got 9 with 8 experts"),
    "top_k above a layer's": ("mola", {"num_experts": (2, 4), "top_k": 3}, C, "with 2 experts on layer 0"),
    "experts for too many layers": ("mola", {"num_experts": (2, 2, 2)}, C, "got 3 values.*the 2 layers"),
    "ranks for too many layers": ("lora", {"r": (1, 2, 3)}, C, "got 3 values.*the 2 layers"),
    "choices for too many layers": ("mola", {"num_experts": 4, "top_k": [1, 2, 3]}, C, "the 2 layers"),
    "share above 1": ("mixlora", {"routing": "top_p", "top_p": 1.5}, C, r"share in \(0, 1\]"),
    "constant gate of weight one": ("llava_mole", {"hard_weight": "one", **UNTAUGHT}, C, "'prob' or 'ste'"),
    "constant gate renormalised": ("mixlora", {"top_k": 1, **UNTAUGHT}, C, "larger top_k"),
    "constant gate on some layer": ("mola", {"top_k": (1, 2), **UNTAUGHT}, C, "constant 1"),
    "constant gate under a bias": ("smora", {"top_k": 1}, C, "constant 1"),
    "scale of ranks": ("smora", {"use_rslora": True}, C, "expected use_rslora=False"),
    "partition": ("smora", {"rank_partition": 7}, C, "expected a divisor"),
    "rank pattern 0": ("lora", {"rank_pattern": {"q_proj": 0}}, C, "rank_pattern.*at least 1"),
    "rank pattern of nothing": ("lora", {"rank_pattern": {"q_prj": 4}}, T, "did you mean 'q_proj'"),
    "alpha pattern of nothing": ("lora", {"alpha_pattern": {"x": 4.0}}, T, "There are: .*q_proj"),
    "partition of a pattern": ("smora", {"rank_partition": 4, "rank_pattern": {"q_proj": 10}}, C, "multiple of 4"),
    "near miss": ("lora", {"target_modules": ["q_prj"]}, T, "did you mean 'q_proj'.*linears are named"),
    "one of two wrong": ("lora", {"target_modules": ["q_proj", "zz"]}, T, "no module is named 'zz'"),
    "nothing matched": ("lora", {"target_modules": "q_proj"}, T, "q_proj.*A list holds name endings"),
    "no names": ("lora", {"target_modules": []}, T, "matches no linear"),
    "bad expression": ("lora", {"target_modules": "("}, C, "not a regular expression"),
    "all excluded": ("lora", {"target_modules": ["q_proj"], "exclude_modules": "q_proj"}, T, "no linear"),
    "excluded near miss": ("lora", {"exclude_modules": ["q_prj"]}, T, "exclude_modules.*'q_proj'"),
    "no such layer": ("lora", {"layers_to_transform": 7}, C, "indices from 0 to 1"),
    "negative layer": ("lora", {"layers_to_transform": [-1]}, C, "indices from 0"),
    "embedding": ("lora", {"target_modules": ["embed_tokens"]}, T, "Embedding.*modules_to_save"),
    "norm": ("lora", {"target_modules": ["input_layernorm"]}, T, "RMSNorm.*modules_to_save"),
    "whole layer": ("lora", {"target_modules": ["mlp"]}, T, "LlamaMLP, expected a linear"),
    "saved module near miss": ("lora", {"modules_to_save": ["lm_hed"]}, T, "did you mean 'lm_head'"),
    "saved and adapted": ("lora", {"modules_to_save": ["mlp"]}, T, "also adapted.*exclude_modules"),
    "no feed-forward block": ("mixlora", {"target_modules": ["q_proj"]}, T, "needs a feed-forward block"),
    "no adapters": ("xlora", {}, C, "expected {name: folder}"),
    "no adapters either": ("meteora", {"adapters": {}}, C, "expected {name: folder}"),
    "adapters in a list": ("xlora", {"adapters": ["a", "b"]}, C, "adapters: got"),
    "dots in a name": ("xlora", {"adapters": {"a.b": "x"}}, C, "without dots"),
    "no folder": ("xlora", {"adapters": {"a": "/no/such/folder"}}, A, "adapter_config.json"),
    "no folder to start from": ("mola", {"init_from": "/no/such/folder"}, A, "adapter_config.json"),
}  # fmt: skip


OTHER_MODELS: dict[str, tuple[str, list[str] | str, str]] = {
    "convolution": ("vit", ["projection"], "Conv2d.*modules_to_save"),
    "tied head": ("gpt2", ["lm_head"], "tied to the embedding transformer.wte"),
    "tied head by expression": ("gpt2", ".*head", "tied to the embedding"),
}


def refused(model: Any, call: Callable[[], Any], error: type[Exception], words: str) -> None:
    """One error of exactly this class, whose text fits and is no longer than a screen; the model as it was."""
    before = snapshot(model)
    state = torch.get_rng_state()
    with pytest.raises(error, match=f"(?s){words}") as e:
        call()
    assert type(e.value) is error
    assert len(str(e.value)) < 1500
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str):
    recipe, options, error, words = OPTIONS[name]
    model = base_model("llama", trainable=True)
    refused(model, lambda: molora.convert(model, recipe, **options), error, words)
    assert molora.convert(model, "lora", r=2) is model, "and it can be converted afterwards"


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_modules_that_are_no_target(name: str):
    base, wanted, words = OTHER_MODELS[name]
    model = base_model(base, trainable=True)
    refused(model, lambda: molora.convert(model, "lora", target_modules=wanted), TargetError, words)


def other_base(root: Path) -> dict[str, str]:
    """Adapters for a llama of another width, and for another architecture."""
    wide = write_adapter(root / "bad" / "wide", "llama", r=2, seed=1)
    file = wide / "adapter_model.safetensors"
    save_file({k: torch.cat([t, t], 1) if "lora_A" in k else t for k, t in load_file(file).items()}, file)
    return {"wide": str(wide), "gpt2": adapters(root, "gpt2")["math"]}


def apart(root: Path) -> dict[str, str]:
    """Two adapters without a module in common."""
    made = {n: write_adapter(root / "bad" / n, "llama", r=2, seed=2, only=(n,)) for n in ("q_proj", "v_proj")}
    return {n: str(folder) for n, folder in made.items()}


@pytest.mark.parametrize("recipe", ["xlora", "meteora"])
def test_adapters_that_do_not_fit(recipe: str, root: Path):
    k = {"xlora": "top_k_lora", "meteora": "top_k"}[recipe]
    good, other = adapters(root, "llama"), other_base(root)
    left_out = {"target_modules": ".*mlp.*", "exclude_modules": ["gate_proj", "up_proj", "down_proj"]}
    cases: list[tuple[dict[str, Any], type[MoloraError], str]] = [
        ({"adapters": {"wide": other["wide"]}, k: 1}, A, "a linear of 96 to 32, this model has 48.*another base"),
        ({"adapters": {"gpt2": other["gpt2"]}, k: 1}, A, "'gpt2'.*shares no module"),
        ({"adapters": {**good, "gpt2": other["gpt2"]}}, A, "'gpt2'.*shares no module"),
        ({"adapters": apart(root)}, A, "no module is adapted by two of them"),
        ({"adapters": good, "target_modules": ["k_prj"]}, T, "did you mean 'k_proj'"),
        ({"adapters": good, **left_out}, T, "matches no linear"),
        ({"adapters": good, "layers_to_transform": 5}, C, "indices from 0 to 1"),
        ({"adapters": good, "rank_pattern": {"q_proj": 2}}, C, "ready-made"),
        ({"adapters": good, k: 4}, C, "got 4 with 3 adapters"),
    ]
    for options, error, words in cases:
        model = base_model("llama")
        refused(model, lambda m=model, o=options: molora.convert(m, recipe, **o), error, words)


def test_a_start_of_another_rank_or_base(root: Path):
    folder = write_adapter(root / "bad" / "start", "llama", r=3, seed=1)
    model = base_model("llama")
    refused(model, lambda: molora.convert(model, "mola", r=4, init_from=str(folder)), AdapterError, "convert with r=3")
    other = other_base(root)["gpt2"]
    refused(model, lambda: molora.convert(model, "mola", init_from=other), AdapterError, "shares no module")


def test_model_wide_router_on_two_streams(root: Path):
    model = base_model("t5")
    own = {"adapters": adapters(root, "t5")}
    refused(model, lambda: molora.convert(model, "xlora", **own), TargetError, "encoder and decoder.*router per module")


@pytest.mark.parametrize("recipe", ["lora", "mixlora"])
def test_twice(recipe: str):
    model = molora.convert(base_model("llama"), "lora", r=2)
    refused(model, lambda: molora.convert(model, recipe), ConfigError, "already carries.*'lora'.*unload")
    molora.convert(model.unload(), recipe, r=2)


def test_loading_over_a_mixture(tmp_path: Path):
    model = molora.convert(base_model("llama"), "lora", r=2)
    model.save_pretrained(tmp_path / "a")
    refused(model, lambda: molora.load(model, tmp_path / "a"), ConfigError, "already carries.*unload")


def test_what_is_no_model():
    with pytest.raises(ConfigError, match="got a str, expected a torch module"):
        molora.convert("gpt2", "lora")  # type: ignore[type-var]


def test_replaced_forward():
    """A device map with hooks, or a patch, puts a forward on the instance: ours would never run."""
    model = base_model("llama")
    model.forward = model.forward
    refused(model, lambda: molora.convert(model, "mixlora"), TargetError, "convert or load first")


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, x, x)[0]
        return self.head(x)


def test_a_linear_that_is_read_and_never_called():
    for wanted in (["out_proj"], ".*out_proj"):
        model = Attentive()
        refused(
            model, lambda m=model, w=wanted: molora.convert(m, "lora", target_modules=w), TargetError, "never calls it"
        )


def test_a_model_without_linears():
    model = nn.Sequential(nn.Embedding(4, 4))
    refused(model, lambda: molora.convert(model, "lora"), TargetError, "none at all")
    refused(model, lambda: molora.convert(model, "lora", layers_to_transform=0), ConfigError, "indices")


def test_a_block_that_carries_no_slots_and_is_no_module():
    model = Toy("sized", bare=True)
    refused(model, lambda: molora.convert(model, "mixlora", r=2), TargetError, "linear by linear")


def test_conv1d_is_a_linear():
    """transformers' Conv1D keeps its weight transposed; it is called, never read."""
    model = molora.convert(base_model("gpt2"), "lora", r=2, target_modules=["c_attn"])
    assert model.transformer.h[0].attn.c_attn.out_features == 96
