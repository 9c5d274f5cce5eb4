"""Routers learn where tokens belong: two kinds of text, an expert that knows each, and only the routers to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from tests.support import behaviours, tiny

WHERE: dict[str, Any] = {"target_modules": ["gate_proj", "up_proj", "down_proj"], "layers_to_transform": [1]}
KINDS = (torch.arange(4, 12), torch.arange(36, 44))  # the tokens of the two kinds
STRIDES = (1, 5)
STEPS, LR = 120, 2e-2
OWN: dict[str, dict[str, Any]] = {
    "mixlora": {"r": 4, "lora_alpha": 16, "num_experts": 2},
    "mola": {"r": 4, "num_experts": 2},
    "smora": {"r": 8, "top_k": 4, "bias_update": 1e-3},
    "llava_mole": {"r": 4, "lora_alpha": 16, "num_experts": 2, "router_aux_loss_coef": 1e-3},
    "xlora": {"xlora_depth": 1},
    "meteora": {"gate_loss_coef": 0.0},  # without its labels: the task loss alone has to teach it
}


def base() -> Any:
    model = tiny.base_model("llama")
    model.lm_head.weight.data.mul_(5)  # sharp enough that the loss can fall
    return model


def text(step: int, stride: int | None = None, rows: int = 16, length: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Rows of one kind each: one walks through its tokens by ones, the other by fives, or both by ``stride``."""
    g = torch.Generator().manual_seed(step)
    kind_B = torch.arange(rows) % 2
    start_B1 = torch.randint(0, 8, (rows, 1), generator=g)
    stride_B1 = torch.tensor(STRIDES)[kind_B].unsqueeze(1) if stride is None else stride
    ids = torch.stack(KINDS)[kind_B].gather(1, (start_B1 + stride_B1 * torch.arange(length)) % 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}, kind_B


def fit(model: Any, steps: int, lr: float, stride: int | None = None) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model.train()(**text(step, stride)[0]).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def mutual_information(ids: Tensor, kinds: Tensor, experts: int) -> float:
    """Bits that a token's first choice says about its kind; at most 1."""
    joint = torch.zeros(2, experts, dtype=torch.float64)
    joint.index_put_((kinds, ids), torch.ones(len(ids), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    apart = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    return float((joint[joint > 0] * (joint / apart)[joint > 0].log2()).sum())


def information(model: Any) -> list[float]:
    """Per router the mutual information of kind and expert, on text not trained on; the experts in two halves."""
    inputs, kind_B = text(10_000)
    kinds = kind_B.repeat_interleave(inputs["input_ids"].shape[1])
    with molora.record_routing(model.eval()) as tape:
        tiny.output(model, inputs)
    records = [r for seen in tape.values() for r in seen]
    halves = [r.dense().unflatten(-1, (2, -1)).sum(-1).argmax(-1) for r in records]
    return [mutual_information(h, kinds, 2) for h in halves]


def test_mutual_information() -> None:
    kinds = torch.tensor([0, 0, 1, 1])
    assert mutual_information(torch.tensor([2, 2, 0, 0]), kinds, 3) == pytest.approx(1.0)
    assert mutual_information(torch.tensor([1, 2, 1, 2]), kinds, 3) == pytest.approx(0.0)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """PEFT LoRA folders of two experts; each applies its own stride to all text, so it is wrong for the other kind."""
    folders = []
    for stride in STRIDES:
        model = molora.convert(base(), "lora", r=4, **WHERE)
        losses = fit(model, 120, 2e-2, stride)
        assert losses[-1] < 0.2
        folders.append(tmp_path_factory.mktemp(f"stride{stride}"))
        model.export_expert(0, folders[-1])
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("recipe", OWN)
def test_the_task_loss_teaches_the_router(recipe: str, experts: list[Path]) -> None:
    own = dict(OWN[recipe])
    if recipe in tiny.IMPORTING:
        own["adapters"] = {"walk": str(experts[0]), "jump": str(experts[1])}
    model = molora.convert(base(), recipe, **WHERE, **own)
    if recipe not in tiny.IMPORTING:
        put_in(model, experts)
    for _, m in behaviours.sites(model):
        m.bank.requires_grad_(False)
    before = information(model)
    losses = fit(model, STEPS, LR)
    after = information(model)
    assert losses[-1] < 0.3 * losses[0]
    assert max(after) > 0.5 > max(before)
    assert sum(after) > 1.5 * sum(before)


def put_in(model: Any, experts: list[Path]) -> None:
    """The two adapters side by side as the first and the second half of every bank."""
    parts = [dict(behaviours.sites(molora.load(base(), folder))) for folder in experts]
    with torch.no_grad():
        for path, m in behaviours.sites(model):
            banks = [sites[path].bank for sites in parts]
            m.bank.lora_A.copy_(torch.cat([b.lora_A for b in banks], 0))
            m.bank.lora_B.copy_(torch.cat([b.lora_B for b in banks], 1))


def test_every_recipe_with_a_router_is_here() -> None:
    assert set(OWN) == set(molora.RECIPES) - {"lora"}
