"""MixLoRA: the feed-forward block becomes a sparse mixture of LoRA experts; attention gets plain LoRA."""

from __future__ import annotations

from molora.config import BalanceConfig, GateConfig, MoloraConfig, RouterConfig
from molora.config.strict import PerLayer
from molora.errors import ConfigError
from molora.recipes.common import Common, recipe

__all__ = ["mixlora"]


@recipe(
    r=16,
    lora_alpha=32,
    released={"router_aux_loss_coef": 1e-3, "balance_scope": "batch"},
    tiny={"r": 4, "lora_alpha": 8, "num_experts": 4},
)
def mixlora(
    *,
    num_experts: PerLayer = 8,
    top_k: PerLayer = 2,
    router_aux_loss_coef: float = 1e-2,
    routing: str = "top_k",
    top_p: float = 0.8,
    jitter: float = 0.0,
    expert_capacity: int = 32,
    router_z_loss_coef: float = 1e-3,
    init_from: str = "",
    init_noise: float = 0.01,
    common: Common,
) -> MoloraConfig:
    """MixLoRA (Li et al. 2024, arXiv 2404.15159, sec. 3): ``y = sum_k w_k FFN_{e_k}(x)``, softmax, top-k, renormalised.

    ``routing``: ``"top_k"``; ``"top_p"`` (experts until the probabilities reach ``top_p``, not renormalised);
    ``"switch"`` (one expert at its own probability, ``expert_capacity`` tokens per sequence, z-loss). The last two do
    not sum to 1, so the converted model differs from the base from the start. The balance loss is eq. 8-9
    (``E sum F P``, F from the first choice). ``released=True``: F over all choices (K at balance), layers and the
    batch's tokens pooled before the product, coefficient 1e-3. ``init_from``: a PEFT LoRA folder copied into every
    expert, with ``init_noise`` times the weights' own spread added.
    """
    gates = {
        "top_k": GateConfig(top_k=top_k, renormalize="one", jitter=jitter),
        "top_p": GateConfig(top_p=top_p, jitter=jitter),
        "switch": GateConfig(top_k=1, capacity=expert_capacity, jitter=jitter),
    }
    if routing not in gates:
        raise ConfigError(f"mixlora: routing: got {routing!r}, expected one of {', '.join(gates)}")
    as_released = (
        {"pooling": "model", "count": "slots"} if common.released and routing == "top_k" else {"count": "argmax"}
    )
    balance = common.switch(router_aux_loss_coef, **as_released)
    if routing == "switch":
        balance += (BalanceConfig(kind="z", coef=router_z_loss_coef, scope=common.balance_scope),)
    experts = common.placement(
        unit="ffn",
        select="ffn",
        num_experts=num_experts,
        router=RouterConfig(scope="block", init_std=1.0 if routing == "switch" else 0.02),
        gate=gates[routing],
        balance=balance,
    )
    attention = common.placement(select="rest", router=RouterConfig(kind="fixed"))
    return common.config("mixlora", experts, attention, init_from=init_from, init_noise=init_noise)
