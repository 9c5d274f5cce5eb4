"""LLaVA-MoLE: each MLP has a few LoRA experts and one router that sends a token to one of them."""

from __future__ import annotations

from molora.config import GateConfig, MoloraConfig, RouterConfig
from molora.config.strict import PerLayer
from molora.recipes.common import Common, recipe

__all__ = ["llava_mole"]


@recipe(r=32, lora_alpha=64, released={"hard_weight": "one", "lora_dropout": 0.05}, tiny={"r": 4, "lora_alpha": 8})
def llava_mole(
    *,
    num_experts: PerLayer = 3,
    top_k: PerLayer = 1,
    hard_weight: str = "prob",
    router_aux_loss_coef: float = 1e-2,
    init_from: str = "",
    init_noise: float = 0.01,
    common: Common,
) -> MoloraConfig:
    """LLaVA-MoLE (Chen et al. 2024, arXiv 2401.16160, sec. 3.2): ``y = W x + w B_e A_e x`` e = the router's argmax.

    One router (with a bias) per MLP, fed with the MLP's input, serves its gate, up and down linears; attention gets
    plain LoRA. ``hard_weight``: w is the probability (``"prob"``), one with a straight-through gradient (``"ste"``),
    or one as released (``"one"``: the task loss then gives the router no gradient). ``modules_to_save`` trains the
    projector. ``released=True``: f and P pooled over layers within a sample, no factor E.
    """
    pooled = {"pooling": "model", "factor": "one"} if common.released else {}
    experts = common.placement(
        select="ffn",
        num_experts=num_experts,
        router=RouterConfig(scope="block", bias=True),
        gate=GateConfig(top_k=top_k, hard_weight=hard_weight),
        balance=common.switch(router_aux_loss_coef, count="argmax", **pooled),
    )
    attention = common.placement(select="rest", router=RouterConfig(kind="fixed"))
    return common.config("llava_mole", experts, attention, init_from=init_from, init_noise=init_noise)
