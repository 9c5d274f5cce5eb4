"""SMoRA: every rank of one LoRA is an expert of its own, chosen per token."""

from __future__ import annotations

from molora.config import BalanceConfig, GateConfig, MoloraConfig, RouterConfig
from molora.config.strict import PerLayer
from molora.errors import ConfigError
from molora.recipes.common import Common, recipe

__all__ = ["smora"]


@recipe(r=64, released={"bias_in_weight": True}, tiny={"r": 16, "top_k": 4, "bias_update": 1e-2})
def smora(
    *,
    top_k: PerLayer = 8,
    rank_partition: int = 1,
    bias_update: float = 1e-5,
    bias_in_weight: bool = False,
    common: Common,
) -> MoloraConfig:
    """SMoRA (Zhao et al. 2025, arXiv 2501.15103, sec. 4): ``y = W x + (alpha / k) sum_{j in top-k} g_j b_j (a_j x)``.

    g = sigmoid scores of the chosen ranks, scaled to sum to k. Balance is loss-free: a bias per rank, moved by
    ``bias_update`` against the load once an optimizer step, steers the choice. ``bias_in_weight=True`` (released code)
    lets the bias into the weight too, and counts padding.
    """
    if common.use_rslora:
        raise ConfigError("smora: use_rslora=True: the scale is alpha / top_k, expected use_rslora=False")
    placement = common.placement(
        rank_one=True,
        scale_by="top_k",
        router=RouterConfig(dropped_input=True),
        gate=GateConfig(
            activation="sigmoid",
            top_k=top_k,
            renormalize="top_k",
            partition=rank_partition,
            bias_in_weight=bias_in_weight,
        ),
        balance=(BalanceConfig(kind="bias", coef=0.0, rate=bias_update, mask_padding=not common.released),),
    )
    return common.config("smora", placement)
