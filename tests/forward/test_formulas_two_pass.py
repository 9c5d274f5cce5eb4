"""X-LoRA written again on the plain base model with forward hooks, against the converted model (arXiv 2402.07148)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.layers.test_formulas import expert_files, largest
from tests.support.tiny import base_model, converted
from tests.support.tolerances import close

LINEARS = [
    f"model.layers.{i}.{n}"
    for i in range(2)
    for n in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
]
Experts = list[tuple[Tensor, Tensor, float]]

CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "one_gate_for_all_modules": {"layerwise_scalings": False},
    "top_k": {"top_k_lora": 2},
    "top_one": {"top_k_lora": 1},
    "softmax_top_k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "both_softmaxes": {"top_k_lora": 2, "enable_softmax_topk": True},
    "no_softmax": {"enable_softmax": False},
    "temperature": {"softmax_temperature": 0.3},
    "depth_1": {"xlora_depth": 1},
    "depth_3": {"xlora_depth": 3},
    "scaling_pass_value": {"scaling_pass_value": 0.3},
    "scaling_pass_value_top_k": {"scaling_pass_value": 0.3, "top_k_lora": 1},
    "global_weight": {"global_scaling_weight": 0.6, "scaling_pass_value": 0.2},
    "trainable_adapters": {"use_trainable_adapters": True},
}


@contextlib.contextmanager
def mixed(base: Any, experts: dict[str, Experts], gates: Callable[[int], Tensor], factor: float) -> Iterator[None]:
    """Within the block every linear m adds ``sum_e gates(m)[..., e] s_e B_e A_e x * factor``."""

    def hook(m: int, path: str) -> Callable[[Any, Any, Tensor], Tensor]:
        def add(_: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            for e, (A, B, s) in enumerate(experts[path]):
                y = y + gates(m)[..., e : e + 1] * s * factor * (args[0] @ A.t() @ B.t())
            return y

        return add

    handles = [base.get_submodule(p).register_forward_hook(hook(m, p)) for m, p in enumerate(LINEARS)]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def gate(logits: Tensor, own: dict[str, Any]) -> Tensor:
    """(..., E) gates of one module: softmax(logits / T), then the K largest as they are, or a softmax over those."""
    g = torch.softmax(logits / own.get("softmax_temperature", 1.0), -1) if own.get("enable_softmax", True) else logits
    if "top_k_lora" not in own:
        return g
    keep = torch.zeros_like(g)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in g.shape[:-1])).tolist():
        keep[*place, largest(g[*place], own["top_k_lora"])] = 1
    if own.get("enable_softmax_topk"):
        return torch.softmax(g.masked_fill(keep == 0, float("-inf")), -1)
    return g * keep


def expected(base: Any, experts: dict[str, Experts], head: list[Any], ids: Tensor, own: dict[str, Any]) -> Tensor:
    """Logits of the second pass, by the paper's two passes."""
    factor = own.get("global_scaling_weight", 1.0)
    constant = torch.full((3,), own.get("scaling_pass_value", 0.0))
    with torch.no_grad(), mixed(base, experts, lambda m: constant.expand(*ids.shape, 3), factor):
        h = base.model(input_ids=ids).last_hidden_state
    for i, layer in enumerate(head):
        h = torch.relu(h) if i else h
        h = h @ layer.weight.t() + layer.bias
    wide = own.get("layerwise_scalings", True)
    assert h.shape[-1] == 3 * (len(LINEARS) if wide else 1)
    with mixed(base, experts, lambda m: gate(h[..., 3 * m : 3 * m + 3] if wide else h, own), factor):
        return base(input_ids=ids).logits


@pytest.mark.parametrize("case", CASES)
def test_xlora(root: Path, case: str):
    own = CASES[case]
    model = converted("xlora", "llama", root, **own)
    banks = {p: model.get_submodule(p).bank for p in LINEARS}
    files = {p: expert_files(root, p) for p in LINEARS}
    ends = [0, 4, 12, 14]  # the adapters have ranks 4, 8 and 2
    experts: dict[str, Experts] = {}
    for p, bank in banks.items():
        mine = [slice(a, b) for a, b in zip(ends[:-1], ends[1:], strict=True)]
        experts[p] = [(bank.lora_A[m], bank.lora_B[:, m], files[p][e][2]) for e, m in enumerate(mine)]
        for (A, B, _), (file_A, file_B, _) in zip(experts[p], files[p], strict=True):
            assert torch.equal(A, file_A)
            assert torch.equal(B, file_B)
    head, ids = list(model.molora_router.layers), torch.arange(3, 17).view(2, 7)
    assert len(head) == own.get("xlora_depth", 2)
    base = base_model("llama").requires_grad_(False)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert any(".lora_" in n for n in trained) == own.get("use_trainable_adapters", False)
    got, wanted = model(input_ids=ids).logits, expected(base, experts, head, ids, own)
    close(got, wanted, "same_math_fp32")
    assert not torch.allclose(got, base(input_ids=ids).logits, atol=1e-2), "the adapters do nothing"
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)) / got.numel() ** 0.5
    ours, theirs = (torch.autograd.grad((y * seed).sum(), list(trained.values())) for y in (got, wanted))
    assert all(g.abs().max() > 0 for g in ours)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, "same_math_fp32")


def test_one_adapter_is_that_lora(root: Path):
    """n = 1 under a softmax: weight 1 for every token and module."""
    folder = expert_files(root) and root / "llama" / "math"
    one = converted("xlora", "llama", root, adapters={"math": folder})
    plain = base_model("llama")
    files = {p: [expert_files(root, p)[2]] for p in LINEARS}
    ids = torch.arange(3, 17).view(2, 7)
    ones = torch.ones(2, 7, 1)
    with torch.no_grad():
        got = one(input_ids=ids).logits
        with mixed(plain, files, lambda m: ones, 1.0):
            close(got, plain(input_ids=ids).logits, "same_math_fp32")
