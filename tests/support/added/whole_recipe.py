"""A recipe of the things of all files here."""

from __future__ import annotations

from cosine_router import CosineConfig
from sparse_penalty import Sparse
from task_margin_rule import MarginConfig
from threshold_gate import ThresholdConfig

from molora.config import MoloraConfig
from molora.recipes import RECIPES
from molora.recipes.common import Common, recipe


@recipe(r=2, init_lora_weights="banded")
def whole(*, num_experts: int = 3, sharpness: float = 4.0, slope: float = 2.0, common: Common) -> MoloraConfig:
    """Cosine logits and a learned threshold; a margin for the task's expert; sparse B; A in bands, with factors."""
    placement = common.placement(
        num_experts=num_experts,
        router=CosineConfig(sharpness=sharpness),
        gate=ThresholdConfig(slope=slope),
        balance=(MarginConfig(),),
        penalties=(Sparse.tiny(),),
        bank="diagonal",
    )
    return common.config("whole", placement)


RECIPES["whole"] = whole
