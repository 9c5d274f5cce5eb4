"""MoLA: LoRA experts on every linear, with a number of experts that changes from layer to layer."""

from __future__ import annotations

from molora.config import GateConfig, MoloraConfig
from molora.config.strict import PerLayer
from molora.errors import ConfigError
from molora.recipes.common import Common, recipe

__all__ = ["ALLOCATIONS", "mola"]

# The published shapes (experts per quarter of the layers), by the digits the paper names them with.
ALLOCATIONS = {s: tuple(int(c) for c in s) for s in ("2468", "8642", "8228", "2882", "5555", "8888")}
DEFAULT = ALLOCATIONS["2468"]


@recipe(released={"lora_dropout": 0.05, "balance_scope": "batch"}, tiny={"r": 4})
def mola(
    *,
    num_experts: PerLayer | str = DEFAULT,
    top_k: PerLayer = 2,
    router_aux_loss_coef: float = 1e-3,
    init_from: str = "",
    init_noise: float = 0.01,
    common: Common,
) -> MoloraConfig:
    """MoLA (Gao et al. 2024, arXiv 2402.08562, sec. 3): ``y = W x + sum_{e in top-k} w_e (alpha / r) B_e A_e x``.

    On every linear, w = softmax over the N_j experts of layer j, the k largest renormalised to sum 1.
    ``num_experts``: one number, a tuple spread over the layers in equal parts, or a published allocation by its
    digits (``"2468"``, ``"8642"``, ``"8228"``, ``"2882"``, ``"5555"``, ``"8888"``). ``released=True``: f and P pooled
    over the batch and a layer's routers, summed over layers, padding counted, dropout 0.05.
    """
    if isinstance(num_experts, str) and num_experts not in ALLOCATIONS:
        raise ConfigError(
            f"num_experts: got {num_experts!r}, expected a number, a tuple, or one of {', '.join(ALLOCATIONS)}"
        )
    experts = ALLOCATIONS[num_experts] if isinstance(num_experts, str) else num_experts
    pooled = {"pooling": "layer", "reduction": "sum", "mask_padding": False} if common.released else {}
    placement = common.placement(
        num_experts=experts,
        sampled=num_experts is DEFAULT,
        gate=GateConfig(top_k=top_k, renormalize="one"),
        balance=common.switch(router_aux_loss_coef, **pooled),
    )
    return common.config("mola", placement, init_from=init_from, init_noise=init_noise)
