"""A recipe: two experts on every linear, a sigmoid gate of their own."""

from __future__ import annotations

from molora.config import GateConfig, MoloraConfig
from molora.recipes import RECIPES
from molora.recipes.common import Common, recipe


@recipe(r=2)
def pair(*, common: Common) -> MoloraConfig:
    """``y = W x + sum_e sigmoid(logit_e) s B_e A_e x`` of two experts."""
    placement = common.placement(num_experts=2, gate=GateConfig(activation="sigmoid"), balance=common.switch(0.01))
    return common.config("pair", placement)


RECIPES["pair"] = pair
