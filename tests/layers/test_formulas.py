"""Each method's equation on one linear, written again from the paper token by token, against the converted layer.

Value and every gradient: input, A, B and router. The feed-forward methods are in test_formulas_blocks.py, the two-pass
method in test_formulas_two_pass.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from molora import context
from molora.context import Frame
from tests.support.tiny import adapters, converted
from tests.support.tolerances import close

WIDE, ALPHA = 32, 16.0
LAYER = "model.layers.1.self_attn.q_proj"


def tokens(shape: tuple[int, ...] = (2, 5, WIDE), seed: int = 4) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def largest(values: Tensor, k: int) -> list[int]:
    """Indices of the k largest, ties to the lower index."""
    return sorted(range(len(values)), key=lambda e: -values[e].item())[:k]


def check(layer: Any, x: Tensor, formula: Callable[[Tensor], Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The layer against ``formula`` of one token, with every gradient; returns the layer's gradients by name."""
    inputs = {"x": x, **{n: p for n, p in inputs.items() if p.requires_grad}}
    got, expected = layer(x), torch.stack([formula(t) for t in x.flatten(0, -2)]).view_as(layer.base_layer(x))
    close(got, expected, "same_math_fp32")
    assert not torch.allclose(got, layer.base_layer(x), atol=1e-3), "the experts do nothing: the layer is not armed"
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(6))
    grads = [torch.autograd.grad(y, list(inputs.values()), seed, allow_unused=True) for y in (got, expected)]
    ours, theirs = ({n: torch.zeros(0) if g is None else g for n, g in zip(inputs, gs, strict=True)} for gs in grads)
    for name in inputs:
        close(ours[name], theirs[name], "same_math_fp32")
    return ours


def parameters(layer: Any) -> dict[str, Tensor]:
    return {"A": layer.bank.lora_A, "B": layer.bank.lora_B, "router": layer.router.weight}


@pytest.mark.parametrize("top_k", [1, 2, 6])
@pytest.mark.parametrize("rslora", [False, True])
def test_mola(root: Path, top_k: int, rslora: bool):
    """arXiv 2402.08562 eq. 5-7: softmax over N_j, top-K, sum to 1; the second of two layers has v[2] = 6 experts."""
    r, E = 3, 6
    top = (1, top_k) if top_k > 2 else top_k
    layer = converted("mola", "llama", root, r=r, lora_alpha=ALPHA, top_k=top, use_rslora=rslora).get_submodule(LAYER)
    A, B, router = parameters(layer).values()
    scale = ALPHA / (math.sqrt(r) if rslora else r)

    def formula(x: Tensor) -> Tensor:
        p = torch.softmax(router @ x, -1)
        chosen = largest(p, top_k)
        y = layer.base_layer.weight @ x
        for e in chosen:
            w = p[e] / sum(p[j] for j in chosen)
            y = y + w * scale * B[:, e * r : (e + 1) * r] @ (A[e * r : (e + 1) * r] @ x)
        return y

    assert router.shape == (E, WIDE)
    grads = check(layer, tokens(), formula, parameters(layer))
    assert bool(grads["router"].abs().max() > 1e-4) == (top_k > 1), "weight 1 whatever the logits: no gradient"


@pytest.mark.parametrize("partition", [1, 2, 4])
@pytest.mark.parametrize("in_weight", [False, True])
@pytest.mark.parametrize("top_k", [4, 16])
def test_smora(root: Path, partition: int, in_weight: bool, top_k: int):
    """arXiv 2501.15103 sec. 4: g = k v / sum(v) over the k largest sigmoid + b; scale alpha / k."""
    R = 16
    own = {"r": R, "top_k": top_k, "rank_partition": partition, "bias_in_weight": in_weight, "lora_alpha": ALPHA}
    layer = converted("smora", "llama", root, **own).get_submodule(LAYER)
    A, B, router = parameters(layer).values()
    b = layer.router.select_bias
    assert b.abs().max() > 0.01, "the bias must be able to change the choice"

    def formula(x: Tensor) -> Tensor:
        s = torch.sigmoid(router @ x).repeat_interleave(partition)
        chosen = largest(s + b, top_k)
        v = {j: s[j] + b[j] if in_weight else s[j] for j in chosen}
        y = layer.base_layer.weight @ x
        for j in chosen:
            g = top_k * v[j] / sum(v.values())
            y = y + ALPHA / top_k * g * (A[j] @ x) * B[:, j]
        return y

    assert router.shape == (R // partition, WIDE)
    check(layer, tokens(), formula, parameters(layer))


def test_smora_bias_changes_the_choice_and_not_the_weight(root: Path):
    """B12: the same layer with the bias at zero picks other ranks, and never trains the bias."""
    model = converted("smora", "llama", root)
    layer, x = model.get_submodule(LAYER), tokens()
    with_bias = layer.route(x.flatten(0, 1))
    assert not layer.router.select_bias.requires_grad
    assert "select_bias" not in dict(layer.router.named_parameters())
    layer.router.select_bias.zero_()
    without = layer.route(x.flatten(0, 1))
    assert not torch.equal(with_bias.ids.sort().values, without.ids.sort().values)
    assert torch.equal(with_bias.probs, without.probs)


def expert_files(root: Path, path: str = LAYER) -> list[tuple[Tensor, Tensor, float]]:
    """(A, B, scale) of each ready-made adapter, read from its folder without molora."""
    out = []
    for folder in adapters(root, "llama").values():
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
        tensors = load_file(Path(folder) / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        r = config["r"]
        out.append((A, B, config["lora_alpha"] / (math.sqrt(r) if config["use_rslora"] else r)))
    return out


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 15.0])
@pytest.mark.parametrize("train_adapters", [False, True])
def test_meteora(root: Path, top_k: int, temperature: float, train_adapters: bool):
    """arXiv 2405.13053 sec. 3: softmax of the K largest logits over T (1 for K = 1); experts of unequal rank."""
    own = {"top_k": top_k, "temperature": temperature, "train_adapters": train_adapters}
    layer = converted("meteora", "llama", root, **own).get_submodule(LAYER)
    files, router = expert_files(root), layer.router.weight
    starts = [0, *torch.tensor([A.shape[0] for A, _, _ in files]).cumsum(0).tolist()]
    A, B = layer.bank.lora_A, layer.bank.lora_B
    for e, (file_A, file_B, _) in enumerate(files):
        assert torch.equal(A[starts[e] : starts[e + 1]], file_A)
        assert torch.equal(B[:, starts[e] : starts[e + 1]], file_B)

    def formula(x: Tensor) -> Tensor:
        logits = router @ x
        chosen = largest(logits, top_k)
        w = torch.softmax(torch.stack([logits[e] for e in chosen]) / temperature, -1)
        y = layer.base_layer.weight @ x
        for k, e in enumerate(chosen):
            mine = slice(starts[e], starts[e + 1])
            y = y + w[k] * files[e][2] * B[:, mine] @ (A[mine] @ x)
        return y

    assert A.requires_grad == train_adapters
    check(layer, tokens(), formula, parameters(layer))


def test_lora(root: Path):
    """arXiv 2106.09685 eq. 3: y = W x + alpha / r B A x."""
    layer = converted("lora", "llama", root, r=4, lora_alpha=ALPHA).get_submodule(LAYER)
    A, B, W = layer.bank.lora_A, layer.bank.lora_B, layer.base_layer.weight
    check(layer, tokens(), lambda x: W @ x + ALPHA / 4 * B @ (A @ x), {"A": A, "B": B})


@pytest.mark.parametrize("recipe", ["mola", "smora"])
def test_dropout_is_one_mask_for_all_experts(root: Path, recipe: str):
    """Formula with the mask put in by hand; SMoRA's router sees the dropped input, MoLA's the whole one."""
    layer = converted(recipe, "llama", root, lora_dropout=0.5).get_submodule(LAYER)
    x = tokens((1, 7, WIDE)).detach()
    layer.train()
    with context.use(Frame(rows=1, observations=[])):
        torch.manual_seed(11)
        got = layer(x)
    torch.manual_seed(11)
    dropped = torch.nn.functional.dropout(x.flatten(0, 1), 0.5, True)
    layer.eval()
    weights = layer.route(dropped if recipe == "smora" else x.flatten(0, 1)).dense()
    expected = layer.base_layer(x[0])
    for e, (r, s) in enumerate(zip(layer.bank.ranks, layer.bank.scales, strict=True)):
        mine = slice(e * r, (e + 1) * r)
        delta = dropped @ layer.bank.lora_A[mine].t() @ layer.bank.lora_B[:, mine].t()
        expected = expected + weights[:, e : e + 1] * s * delta
    close(got[0], expected, "same_math_fp32")
