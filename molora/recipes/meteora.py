"""MeteoRA: ready-made LoRA adapters with a gate on every linear that picks a few of them per token."""

from __future__ import annotations

import os
from collections.abc import Mapping

from molora.config import BalanceConfig, GateConfig, MoloraConfig, RouterConfig
from molora.recipes.common import Common, folders, recipe

__all__ = ["meteora"]


@recipe(released={"gate_loss_coef": 50.0, "train_adapters": True, "lora_dropout": 0.1, "init_std": 1.0})
def meteora(
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    top_k: int = 2,
    temperature: float = 1.0,
    gate_loss_coef: float = 1.0,
    train_adapters: bool = False,
    init_std: float | None = None,
    common: Common,
) -> MoloraConfig:
    """MeteoRA (Xu et al. 2024, arXiv 2405.13053, sec. 3): ``y = W x + sum_{e in top-k} w_e s_e B_e A_e x``.

    w = softmax(top-k logits / temperature); one gate per linear, without bias. With ``task_ids`` (B,) or (B, S) in the
    batch (-100 = none) the gates also learn from a cross entropy to the task's adapter, averaged over the gates.
    ``released=True``: coefficient 50, labels shifted by one token, adapters trained too, gates drawn from N(0, 1),
    dropout 0.1. ``adapters``: PEFT LoRA folders; those of PEFT's other methods become LoRA by
    ``molora.interop.to_lora.to_lora(base_model, folder, out_folder, rank=16)``.
    """
    gate_loss = BalanceConfig(kind="supervised", coef=gate_loss_coef, scope=common.balance_scope, shift=common.released)
    placement = common.placement(
        imported=True,
        train_experts=train_adapters,
        router=RouterConfig(init_std=init_std),
        gate=GateConfig(top_k=top_k, temperature=temperature, renormalize="one"),
        balance=(gate_loss,) if gate_loss_coef else (),
    )
    return common.config("meteora", placement, adapters=folders("meteora", adapters))
