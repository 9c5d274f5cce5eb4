"""Gated units, ``act(u) * v``: which blocks are one, and that their middle runs at once where a kernel can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import molora
from molora.layers.linear import MixtureLinear
from molora.surgery.blocks import ffn_blocks
from molora.surgery.trace import trace
from tests.support.tiny import base_model, converted
from tests.surgery.test_ffn_found import EXPECTED

UNITS = {
    **{name: ("silu", "model.layers.0.mlp.gate_proj") for name in ("llama", "qwen3", "mistral")},
    "gemma3": ("gelu_tanh", "model.layers.0.mlp.gate_proj"),
    "t5_gated": ("gelu_tanh", "encoder.block.0.layer.1.DenseReluDense.wi_0"),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_gated_units(name: str):
    """``act(u) * v`` of two linears, with the activation and the linear that it is on; nothing else is one."""
    first = ffn_blocks(trace(base_model(name)))[0]
    assert (first.act, first.gated) == UNITS.get(name, ("", ""))


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_a_middle_with_dropout_is_no_whole_unit(rate: float):
    """What runs at once has no place for the model's own dropout in training."""
    model = base_model("t5_gated")
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.p = rate
    before = torch.get_rng_state()
    molora.convert(model, "mixlora")
    assert torch.equal(before, torch.get_rng_state())
    acts = {m.site.act for m in model.modules() if isinstance(m, MixtureLinear) and m.site.role != "linear"}
    assert acts == ({"gelu_tanh"} if rate == 0 else {""})


@pytest.mark.parametrize(
    ("name", "more", "slots"),
    [
        ("llama", {}, False),
        ("gemma3", {}, False),
        ("phi3", {}, True),
        ("llama", {"rank_pattern": {"down_proj": 3}}, True),
        ("llama", {"kernel": "loop"}, True),
    ],
    ids=["llama", "gelu", "fused", "unequal", "loop"],
)
def test_gated_units_have_no_slot_axis_without_gradients(name: str, more: dict[str, Any], slots: bool, root: Path):
    """The module's own middle sees one zero per token there; with gradients, or no unit, a row per chosen expert."""
    model = converted("mixlora", name, root, r=4, num_experts=4, top_k=2, **more)
    mlp = model.model.layers[0].mlp
    act = next(m for n, m in mlp.named_children() if "act" in n)
    seen: list[torch.Size] = []
    act.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    x = torch.randn(3, 32)
    mlp(x)
    with torch.no_grad():
        mlp(x)
    wide = torch.Size((3, 2, model.config.intermediate_size))
    assert seen == [wide, wide if slots else torch.Size((3, 1, 1))]
