"""Exact numbers of trainable parameters on the shapes of LLaMA-2-7B, built without storage; and how long that takes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers

import molora
from molora.layers.linear import MixtureLinear

LAYERS, D, F = 32, 4096, 11008
SHAPES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (D, D)),
    **dict.fromkeys(("gate_proj", "up_proj"), (D, F)),
    "down_proj": (F, D),
}
LIMIT = 5.0  # seconds of CPU time for one conversion; about 1 is needed


@pytest.fixture(scope="module")
def llama() -> Any:
    """LLaMA-2-7B on the meta device: 6.74 billion parameters without a byte."""
    config = transformers.LlamaConfig(
        hidden_size=D, intermediate_size=F, num_hidden_layers=LAYERS, num_attention_heads=32, vocab_size=32000
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def trainable(model: Any, recipe: str, **options: Any) -> tuple[int, int, float]:
    """(all trainable parameters, those of routers, seconds of CPU time); leaves the model as it was."""
    start = time.process_time()
    molora.convert(model, recipe, **options)
    seconds = time.process_time() - start
    try:
        total = model.get_nb_trainable_parameters()[0]
        routers = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".router." in n)
        assert all(p.device.type == "meta" for p in model.parameters())
        return total, routers, seconds
    finally:
        model.unload()


PER_EXPERT_LAYER = sum(8 * (i + o) + i for i, o in SHAPES.values())  # rank 8 on seven linears, and a router column each


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ("2468", 105_635_840),
        ("2882", 105_635_840),
        ("8888", 169_017_344),
        ((6, 5, 3, 2), 84_508_672),
        ((2, 6, 6, 2), 84_508_672),
        (4, 84_508_672),
    ],
)
def test_mola(llama: Any, allocation: str | int | tuple[int, ...], expected: int):
    assert PER_EXPERT_LAYER == 660_224
    total, routers, seconds = trainable(llama, "mola", num_experts=allocation, r=8)
    assert total == expected
    assert total % PER_EXPERT_LAYER == 0
    assert routers == total // PER_EXPERT_LAYER * 35_584
    assert seconds < LIMIT


def test_mola_puts_the_experts_where_the_paper_does(llama: Any):
    """2468: eight layers of 2, eight of 4, eight of 6, eight of 8, on each of the seven linears."""
    molora.convert(llama, "mola", num_experts="2468", r=8)
    try:
        for path, m in llama.named_modules():
            if isinstance(m, MixtureLinear):
                layer = int(path.split(".")[2])
                assert m.site.num_experts == 2 * (layer // 8 + 1)
                assert (m.in_features, m.out_features) == SHAPES[path.split(".")[-1]]
    finally:
        llama.unload()


def test_mixlora(llama: Any):
    """Rank 16, 8 experts on the feed-forward linears, one LoRA on attention, a router a layer without bias."""
    total, routers, seconds = trainable(llama, "mixlora", r=16, num_experts=8)
    assert total - routers == 202_375_168
    assert routers == 1_048_576
    assert seconds < LIMIT


def test_lora(llama: Any):
    """The baseline of MixLoRA's table 1: rank 80 on all seven linears."""
    assert trainable(llama, "lora", r=80)[0] == 199_884_800


def test_smora(llama: Any):
    """Total rank 64: the LoRA's 159.9 M, and a router as large as all A together."""
    total, routers, seconds = trainable(llama, "smora")
    assert routers == LAYERS * 64 * sum(i for i, _ in SHAPES.values())
    assert total - routers == LAYERS * 64 * sum(i + o for i, o in SHAPES.values()) == 159_907_840
    assert seconds < LIMIT


def test_llava_mole(llama: Any):
    total, routers, _ = trainable(llama, "llava_mole")
    experts = sum(3 * 32 * sum(SHAPES[n]) for n in ("gate_proj", "up_proj", "down_proj"))
    attention = 4 * 32 * 2 * D
    assert routers == LAYERS * 3 * (D + 1)
    assert total - routers == LAYERS * (experts + attention)


def test_conversion_keeps_the_meta_model_as_it_was(llama: Any):
    before = [(n, p.shape, p.requires_grad) for n, p in llama.named_parameters()]
    trainable(llama, "mixlora")
    assert [(n, p.shape, p.requires_grad) for n, p in llama.named_parameters()] == before
