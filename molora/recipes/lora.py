"""Plain LoRA: one expert, always on. The baseline that a mixture has to beat."""

from __future__ import annotations

from molora.config import MoloraConfig, RouterConfig
from molora.recipes.common import Common, recipe

__all__ = ["lora"]


@recipe(tiny={"r": 4})
def lora(*, common: Common) -> MoloraConfig:
    """LoRA (Hu et al. 2021, arXiv 2106.09685): ``y = W x + (alpha / r) B A x`` on every linear of the stack."""
    return common.config("lora", common.placement(router=RouterConfig(kind="fixed")))
