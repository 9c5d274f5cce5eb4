"""Two recipes that are in no file of the package, as a plugin of pytest: ``-p tests.support.newcomers``.

They enter ``RECIPES`` before any test is collected, as a new line of the table would. test_newcomers.py runs the
matrix on them.
"""

from __future__ import annotations

from molora.config import BalanceConfig, GateConfig, MoloraConfig, RouterConfig
from molora.recipes import RECIPES
from molora.recipes.common import Common, recipe

__all__ = ["NEWCOMERS"]


@recipe(tiny={"r": 4})
def new_sigmoid(*, num_experts: int = 4, top_k: int = 2, common: Common) -> MoloraConfig:
    """``y = W x + sum_{e in top-2} sigmoid(r_e x) B_e A_e x`` on every linear, with a z-loss alone."""
    experts = common.placement(
        num_experts=num_experts,
        gate=GateConfig(activation="sigmoid", top_k=top_k),
        balance=(BalanceConfig(kind="z", coef=1e-3, scope=common.balance_scope),),
    )
    return common.config("new_sigmoid", experts)


@recipe(tiny={"r": 4})
def new_blocks(*, num_experts: int = 3, top_k: int = 2, common: Common) -> MoloraConfig:
    """``y = sum_k w_k FFN_{e_k}(x)`` with three experts; attention stays as it is."""
    experts = common.placement(
        unit="ffn",
        select="ffn",
        num_experts=num_experts,
        router=RouterConfig(scope="block"),
        gate=GateConfig(top_k=top_k, renormalize="one"),
        balance=common.switch(1e-2),
    )
    return common.config("new_blocks", experts)


NEWCOMERS = {"new_sigmoid": new_sigmoid, "new_blocks": new_blocks}


def pytest_configure() -> None:
    RECIPES.update(NEWCOMERS)
