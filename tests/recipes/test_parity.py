"""Parity with the installed PEFT (one LoRA; X-LoRA) and of MixLoRA with its naive form."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.layers.linear import MixtureLinear
from tests.support.tiny import arm, base_model, batch, converted, output, write_adapter
from tests.support.tolerances import close

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def peft() -> Any:
    return pytest.importorskip("peft", reason="parity with PEFT needs the extra 'peft'")


# ---- one expert, always on ----

LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 16, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}},
    "some_layers": {"r": 4, "lora_alpha": 8, "layers_to_transform": [1]},
}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("case", LORA)
def test_one_expert_is_peft_lora(peft: Any, case: str, name: str):
    """B6: outputs and gradients of A and B, with the same weights put in both."""
    targets = ALL if name == "llama" else ["c_attn", "c_fc", "mlp.c_proj"]
    own = dict(LORA[case])
    if name == "gpt2" and case == "patterns":
        own |= {"rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_fc": 3}}
    ours = arm(molora.convert(base_model(name), "lora", target_modules=targets, **own))
    theirs = peft.get_peft_model(base_model(name), peft.LoraConfig(target_modules=targets, **own))
    sites = {n: m for n, m in ours.named_modules() if isinstance(m, MixtureLinear)}
    layers = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert sites.keys() == layers.keys()
    with torch.no_grad():
        for path, site in sites.items():
            layers[path].lora_A["default"].weight.copy_(site.bank.lora_A)
            layers[path].lora_B["default"].weight.copy_(site.bank.lora_B)
            assert layers[path].scaling["default"] == pytest.approx(site.bank.scales[0])
    inputs = batch(name)
    a, b = ours(**inputs), theirs(**inputs)
    close(a.logits, b.logits, "peft_lora")
    a.loss.backward()
    b.loss.backward()
    for path, site in sites.items():
        close(site.bank.lora_A.grad, layers[path].lora_A["default"].weight.grad, "peft_lora")
        close(site.bank.lora_B.grad, layers[path].lora_B["default"].weight.grad, "peft_lora")
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


def test_fresh_a_is_drawn_like_pefts(peft: Any):
    """Kaiming A in the same bounds, zero B."""
    ours = molora.convert(base_model("llama"), "lora", r=8)
    theirs = peft.get_peft_model(base_model("llama"), peft.LoraConfig(target_modules=ALL, r=8))
    for path, m in ours.named_modules():
        if isinstance(m, MixtureLinear):
            layer = theirs.base_model.model.get_submodule(path)
            bound = 1 / m.in_features**0.5
            for A in (m.bank.lora_A, layer.lora_A["default"].weight):
                assert 0.8 * bound < A.abs().max() <= bound
            assert not m.bank.lora_B.any()


# ---- X-LoRA ----

XLORA: dict[str, dict[str, Any]] = {
    "dense": {},
    "one_gate_for_all_modules": {"layerwise_scalings": False},
    "depth_1": {"xlora_depth": 1},
    "depth_3": {"xlora_depth": 3},
    "top_k": {"top_k_lora": 2},
    "softmax_top_k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "both_softmaxes": {"top_k_lora": 2, "enable_softmax_topk": True},
    "temperature": {"softmax_temperature": 0.5},
    "raw_gates": {"enable_softmax": False},
    "global_weight": {"global_scaling_weight": 0.7},
    "scaling_pass_value": {"scaling_pass_value": 0.25},
    "trainable_adapters": {"use_trainable_adapters": True},
}


def folders(root: Path) -> dict[str, str]:
    """Adapters of unequal rank and targets, under the numeric names that PEFT's X-LoRA needs."""
    made = {
        "0": write_adapter(root / "peft" / "0", "llama", r=4, seed=21),
        "1": write_adapter(root / "peft" / "1", "llama", r=8, seed=22, rslora=True),
        "2": write_adapter(root / "peft" / "2", "llama", r=2, seed=23, only=("q_proj", "v_proj", "down_proj")),
    }
    return {name: str(folder) for name, folder in made.items()}


def pefts(peft: Any, adapters: dict[str, str], own: dict[str, Any]) -> Any:
    base = base_model("llama")
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters=adapters, **{"layerwise_scalings": True, **own}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config)


def copy_head(ours: Any, theirs: Any, scale: float) -> None:
    """PEFT's classifier weights, times ``scale``, into both; PEFT numbers modules in module order, as we do sites."""
    linears = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for a, b in zip(ours.molora_router.layers, linears, strict=True):
            b.weight.mul_(scale)
            a.weight.copy_(b.weight)
            a.bias.copy_(b.bias)


@pytest.mark.parametrize("case", XLORA)
def test_xlora_is_pefts(peft: Any, case: str, root: Path):
    own = {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0, **XLORA[case]}
    adapters = folders(root)
    theirs = pefts(peft, adapters, own)
    ours = molora.convert(base_model("llama"), "xlora", adapters=adapters, **own)
    # Softmaxed gates are to be far from uniform; raw ones are unbounded and would only magnify rounding.
    copy_head(ours, theirs, scale=1.0 if case == "raw_gates" else 6.0)
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    a, b = ours(**inputs).logits, theirs(**inputs).logits
    close(a, b, "same_math_fp32")
    assert not torch.allclose(a, output(base_model("llama"), inputs), atol=0.05), "the adapters do nothing"
    seed = torch.randn(a.shape, generator=torch.Generator().manual_seed(1)) / a.numel() ** 0.5
    (a * seed).sum().backward()
    (b * seed).sum().backward()
    heads = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, torch.nn.Linear)]
    for x, y in zip(ours.molora_router.layers, heads, strict=True):
        assert x.weight.grad.abs().max() > 0
        close(x.weight.grad, y.weight.grad, "peft_xlora")
        close(x.bias.grad, y.bias.grad, "peft_xlora")
    if own.get("use_trainable_adapters"):
        site = ours.model.layers[0].self_attn.q_proj
        layer = theirs.base_model.lora_model.model.model.layers[0].self_attn.q_proj
        close(site.bank.lora_A.grad[:4], layer.lora_A["0"].weight.grad, "peft_xlora")
        close(site.bank.lora_B.grad[:, 4:12], layer.lora_B["1"].weight.grad, "peft_xlora")


def test_xlora_generates_what_peft_generates(peft: Any, root: Path):
    """Greedy: PEFT recomputes the whole sequence for each token, molora keeps two caches."""
    own, adapters = {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0}, folders(root)
    theirs = pefts(peft, adapters, own)
    ours = molora.convert(base_model("llama"), "xlora", adapters=adapters, **own)
    copy_head(ours, theirs, scale=6.0)
    ids = torch.arange(3, 9).view(1, 6)
    a = ours.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    b = theirs.generate(input_ids=ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert a.tolist() == b.tolist()


# ---- MixLoRA: each chosen expert's own block, against the shared projections ----


def delta(site: Any, z: Tensor, e: int) -> Tensor:
    """s_e B_e A_e z of one linear."""
    A, B, s = site.bank.expert(e)
    return s * (z @ A.t() @ B.t())


def expert_block(mlp: Any, x: Tensor, e: int, once: tuple[Tensor, Tensor] | None) -> Tensor:
    """FFN_e on all tokens: three frozen projections of its own, or those of W1 and W3 handed in."""
    g, u = once or (mlp.gate_proj.base_layer(x), mlp.up_proj.base_layer(x))
    h = torch.nn.functional.silu(g + delta(mlp.gate_proj, x, e)) * (u + delta(mlp.up_proj, x, e))
    return mlp.down_proj.base_layer(h) + delta(mlp.down_proj, h, e)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixlora_vanilla_shared_and_fully_shared(root: Path, top_k: int):
    """Values and gradients of the three forms agree; ours is the fully shared one."""
    mlp = converted("mixlora", "llama", root, num_experts=4, top_k=top_k).model.layers[0].mlp
    x = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(3)).requires_grad_()
    probs = torch.softmax(x @ mlp.gate_proj.router.weight.t(), -1)
    values, ids = probs.topk(top_k, -1)
    weights = torch.zeros_like(probs).scatter(-1, ids, values / values.sum(-1, keepdim=True))
    once = mlp.gate_proj.base_layer(x), mlp.up_proj.base_layer(x)
    vanilla = sum(weights[..., e : e + 1] * expert_block(mlp, x, e, None) for e in range(4))
    shared = sum(weights[..., e : e + 1] * expert_block(mlp, x, e, once) for e in range(4))
    ours = mlp(x)
    close(shared, vanilla, "same_math_fp32")
    close(ours, vanilla, "same_math_fp32")
    inputs = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5))
    wanted = torch.autograd.grad(vanilla, inputs, seed, retain_graph=True)
    for y in (shared, ours):
        for got, want in zip(torch.autograd.grad(y, inputs, seed, retain_graph=True), wanted, strict=True):
            close(got, want, "same_math_fp32")
