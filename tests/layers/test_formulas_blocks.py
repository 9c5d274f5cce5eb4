"""LLaVA-MoLE and MixLoRA on one feed-forward block: the papers' equations, token by token, with every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molora import context
from molora.context import Frame
from tests.layers.test_formulas import largest, tokens
from tests.support.tiny import converted
from tests.support.tolerances import close

R, ALPHA = 4, 8.0
BLOCK = "model.layers.1.mlp"
NAMES = ("gate_proj", "up_proj", "down_proj")


class Block:
    """The parts of one converted MLP, and ``W z + w s B_e A_e z`` of one of its linears for one token."""

    def __init__(self, model: Any) -> None:
        self.mlp = model.get_submodule(BLOCK)
        self.linears = {n: getattr(self.mlp, n) for n in NAMES}
        self.router = self.linears["gate_proj"].router
        assert all(self.linears[n].router is None for n in NAMES[1:]), "one router per block"

    def linear(self, name: str, z: Tensor, e: int, w: Tensor | float = 1.0) -> Tensor:
        site = self.linears[name]
        mine = slice(e * R, (e + 1) * R)
        A, B = site.bank.lora_A[mine], site.bank.lora_B[:, mine]
        return site.base_layer.weight @ z + w * (ALPHA / R) * (B @ (A @ z))

    def ffn(self, x: Tensor, e: int, w: Tensor | float = 1.0) -> Tensor:
        """W2(silu(W1 x) * W3 x), each with expert e, its delta times w."""
        h = torch.nn.functional.silu(self.linear("gate_proj", x, e, w)) * self.linear("up_proj", x, e, w)
        return self.linear("down_proj", h, e, w)

    def parameters(self) -> dict[str, Tensor]:
        return {n: p for n, p in self.mlp.named_parameters() if p.requires_grad}

    def check(self, x: Tensor, expected: Tensor, got: Tensor) -> dict[str, Tensor]:
        close(got, expected, "same_math_fp32")
        inputs = {"x": x, **self.parameters()}
        seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(6))
        grads = [torch.autograd.grad(y, list(inputs.values()), seed, allow_unused=True) for y in (got, expected)]
        ours, theirs = (
            {n: torch.zeros_like(inputs[n]) if g is None else g for n, g in zip(inputs, gs, strict=True)}
            for gs in grads
        )
        for name in inputs:
            close(ours[name], theirs[name], "same_math_fp32")
        return ours


@pytest.mark.parametrize("hard", ["prob", "one", "ste"])
def test_llava_mole(root: Path, hard: str):
    """arXiv 2401.16160 sec. 3.2: e = argmax of softmax(W_r x + b), one e for gate, up and down; w = p, 1, or 1 with p's
    gradient."""
    block = Block(converted("llava_mole", "llama", root, r=R, lora_alpha=ALPHA, hard_weight=hard))
    x = tokens()
    rows = []
    for t in x.flatten(0, 1):
        p = torch.softmax(block.router.weight @ t + block.router.bias, -1)
        e = largest(p, 1)[0]
        w = {"prob": p[e], "one": 1.0, "ste": p[e] - p[e].detach() + 1}[hard]
        rows.append(block.ffn(t, e, w))
    grads = block.check(x, torch.stack(rows).view_as(x), block.mlp(x))
    assert {n for n in grads if "router" in n} == {"gate_proj.router.weight", "gate_proj.router.bias"}
    assert bool(grads["gate_proj.router.weight"].any()) == (hard != "one")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_mixlora_top_k(root: Path, top_k: int):
    """arXiv 2404.15159 eq. 4-7: softmax over E, the K largest renormalised, y = sum_k w_k FFN_k(x)."""
    block = Block(converted("mixlora", "llama", root, r=R, lora_alpha=ALPHA, num_experts=4, top_k=top_k))
    x = tokens()
    rows = []
    for t in x.flatten(0, 1):
        p = torch.softmax(block.router.weight @ t, -1)
        chosen = largest(p, top_k)
        rows.append(sum(p[e] / p[chosen].sum() * block.ffn(t, e) for e in chosen))
    block.check(x, torch.stack(rows).view_as(x), block.mlp(x))


@pytest.mark.parametrize("top_p", [0.4, 0.8, 1.0])
def test_mixlora_top_p(root: Path, top_p: float):
    """Experts in falling order until their sum reaches p, the crossing one included; not renormalised."""
    own = {"r": R, "lora_alpha": ALPHA, "num_experts": 4, "routing": "top_p", "top_p": top_p}
    block = Block(converted("mixlora", "llama", root, **own))
    x = tokens()
    rows, counts = [], set()
    for t in x.flatten(0, 1):
        p = torch.softmax(block.router.weight @ t, -1)
        chosen: list[int] = []
        for e in largest(p, 4):
            if sum(p[chosen]) < top_p:
                chosen.append(e)
        counts.add(len(chosen))
        rows.append(sum(p[e] * block.ffn(t, e) for e in chosen))
    assert counts == {4} if top_p == 1.0 else len(counts) > 1
    block.check(x, torch.stack(rows).view_as(x), block.mlp(x))


@pytest.mark.parametrize("capacity", [1, 2, 32])
def test_mixlora_switch(root: Path, capacity: int):
    """arXiv 2101.03961 sec. 2.2: one expert at its own probability; tokens of a sequence beyond an expert's capacity
    get nothing from the block."""
    own = {"r": R, "lora_alpha": ALPHA, "num_experts": 3, "routing": "switch", "expert_capacity": capacity}
    block = Block(converted("mixlora", "llama", root, **own))
    x = tokens()
    rows, dropped = [], 0
    for row in x:
        load = [0, 0, 0]
        for t in row:
            p = torch.softmax(block.router.weight @ t, -1)
            e = largest(p, 1)[0]
            load[e] += 1
            dropped += load[e] > capacity
            rows.append(p[e] * block.ffn(t, e) if load[e] <= capacity else t * 0)
    assert bool(dropped) == (capacity < 5)
    with context.use(Frame(rows=2)):
        got = block.mlp(x)
    block.check(x, torch.stack(rows).view_as(x), got)


def test_mixlora_attention_is_plain_lora(root: Path):
    model = converted("mixlora", "llama", root, r=R, lora_alpha=ALPHA)
    site = model.get_submodule("model.layers.0.self_attn.o_proj")
    x = tokens()
    A, B = site.bank.lora_A, site.bank.lora_B
    assert A.shape == (R, 32)
    close(site(x), site.base_layer(x) + ALPHA / R * (x @ A.t() @ B.t()), "same_math_fp32")
    assert [n for n, _ in site.named_parameters()] == ["base_layer.weight", "bank.lora_A", "bank.lora_B"]


def test_one_expert_per_token_is_both_methods(root: Path):
    """With one expert a token at weight 1, mixing outputs (MixLoRA) and mixing deltas (LLaVA-MoLE) coincide."""
    ffn = converted("mixlora", "llama", root, r=R, lora_alpha=ALPHA, num_experts=3, top_k=1)
    linear = converted("llava_mole", "llama", root, r=R, lora_alpha=ALPHA, hard_weight="one")
    own = dict(ffn.named_parameters())
    with torch.no_grad():
        for name, p in linear.named_parameters():
            p.copy_(own[name]) if name in own else p.zero_()
    ids = torch.arange(3, 21).view(2, 9)
    with torch.no_grad():
        close(linear(input_ids=ids).logits, ffn(input_ids=ids).logits, "same_math_fp32")
