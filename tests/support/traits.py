"""What a mixture does, read off its config and the tables of the package.

Tests over all recipes ask for these traits and never for a recipe's name, so that a new line in ``RECIPES`` is tested
without a change of any test.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from molora.config import BalanceConfig, GateConfig, MoloraConfig, Placement
from molora.recipes import RECIPES
from molora.routers import BALANCES, GATES, ROUTERS
from molora.routers.balance.switch import Switch

__all__ = ["ADAPTERS", "Traits", "changed", "having", "small", "still", "strong", "takes", "traits", "with_rules"]

ADAPTERS = ("0", "lora_1", "math")  # names of the ready-made adapters in tests; PEFT stumbles over such names


@dataclass(frozen=True)
class Traits:
    """The answers for one config. ``choosing`` and ``rules`` are what most of them are read from."""

    config: MoloraConfig

    @property
    def choosing(self) -> tuple[Placement, ...]:
        """The placements whose router gives tokens weights of their own."""
        return tuple(p for p in self.config.placements if ROUTERS[p.router.kind].chooses)

    @property
    def rules(self) -> tuple[BalanceConfig, ...]:
        """All balance rules, those without a loss among them."""
        return tuple(dict.fromkeys(b for p in self.choosing for b in p.balance))

    # ---- who computes the weights ----

    @property
    def routes(self) -> bool:
        """Whether a router gives tokens weights of their own somewhere."""
        return bool(self.choosing)

    @property
    def always_on(self) -> bool:
        """Whether some linears have experts that no router chooses."""
        return len(self.choosing) < len(self.config.placements)

    @property
    def merges(self) -> bool:
        """Whether fixed weights give the same outputs: every linear has one expert, always on."""
        return not self.routes and all(p.num_experts == 1 for p in self.config.placements)

    @property
    def model_wide(self) -> bool:
        """Whether one router serves the whole model, by a pass of its own before the real one."""
        return any(p.router.scope == "model" for p in self.choosing)

    @property
    def in_blocks(self) -> bool:
        """Whether the routers stand at feed-forward blocks, and not everywhere."""
        return any(p.select == "ffn" for p in self.choosing)

    @property
    def mixes_blocks(self) -> bool:
        """Whether whole feed-forward blocks are mixed, in several slots: equal to the base only to rounding."""
        return any(p.unit == "ffn" for p in self.choosing)

    # ---- how the weights are made ----

    @property
    def picks(self) -> bool:
        """Whether every router keeps a fixed number of experts for a token."""
        return self.routes and all(p.gate.top_k is not None for p in self.choosing)

    @property
    def picks_one(self) -> bool:
        """Whether every router keeps exactly one."""
        return self.routes and all(p.gate.top_k == 1 for p in self.choosing)

    @property
    def picks_everywhere(self) -> bool:
        """Whether every adapted linear has a choice of its own, so that kernels for chosen experts can run it."""
        return self.picks and not self.always_on and not self.mixes_blocks

    @property
    def renormalises(self) -> bool:
        """Whether the chosen weights are scaled by their own sum: an expert that nobody chose does not count."""
        return self.routes and all(p.gate.renormalize != "none" for p in self.choosing)

    @property
    def sums_to_one(self) -> bool:
        """Whether a token's weights sum to 1."""
        return self.routes and all(_sums_to_one(p.gate) for p in self.choosing)

    @property
    def is_dense_at_all(self) -> bool:
        """Whether choosing all experts is the same as no choice."""
        gates = [p.gate for p in self.choosing]
        kept = all(g.renormalize == "none" or (g.renormalize, g.activation) == ("one", "softmax") for g in gates)
        return self.routes and kept and not self.scales_by_choices

    @property
    def rank_one(self) -> bool:
        """Whether every rank is an expert."""
        return any(p.rank_one for p in self.choosing)

    @property
    def couples_tokens(self) -> bool:
        """Whether a token's weights depend on the other tokens of its row."""
        return any(GATES[p.gate.kind].couples_tokens(p.gate) for p in self.choosing)

    @property
    def scales_by_choices(self) -> bool:
        """Whether the number of choices is part of the scale."""
        return any(p.scale_by == "top_k" or p.gate.renormalize == "top_k" for p in self.choosing)

    # ---- how it is trained ----

    @property
    def losses(self) -> tuple[BalanceConfig, ...]:
        """The rules that add to the loss."""
        return tuple(b for b in self.rules if b.coef > 0 and not BALANCES[b.kind].at_router)

    @property
    def balanced(self) -> bool:
        """Whether the outputs get an ``aux_loss``."""
        return any(BALANCES[b.kind].measures_balance for b in self.losses)

    @property
    def switch(self) -> BalanceConfig | None:
        """The one rule, where it is the Switch loss of each router over real tokens; what slow oracles compute."""
        plain = [
            b
            for b in self.losses
            if BALANCES[b.kind] is Switch
            and (b.pooling, b.factor, b.reduction) == ("router", "experts", "mean")
            and b.count in ("argmax", "picks")
        ]
        return plain[0] if len(plain) == len(self.rules) == 1 and plain[0].mask_padding else None

    @property
    def steers(self) -> bool:
        """Whether a bias without a loss steers the choice and moves once an optimizer step."""
        return any(BALANCES[b.kind].steers for b in self.rules)

    @property
    def needs_tasks(self) -> bool:
        """Whether a rule learns from task ids."""
        return any(BALANCES[b.kind].needs_tasks for b in self.rules)

    @property
    def needs_frame(self) -> bool:
        """Whether a layer in training raises outside of the model's forward: something of it would be lost."""
        return self.model_wide or any(b.coef > 0 or BALANCES[b.kind].at_router for b in self.rules)

    @property
    def needs_frame_again(self) -> bool:
        """Whether a recompute raises outside of it; what was counted in the forward is not counted again."""
        return self.model_wide or any(b.coef > 0 for b in self.rules)

    @property
    def refuses_re_entrant(self) -> bool:
        """Whether re-entrant checkpointing is refused."""
        return self.model_wide or bool(self.rules)

    @property
    def imported(self) -> bool:
        """Whether the experts are ready-made adapters, which have to be given as folders."""
        return any(p.imported for p in self.config.placements)

    @property
    def trains_experts(self) -> bool:
        """Whether the experts that a router chooses are trained."""
        return any(p.train_experts for p in self.choosing or self.config.placements)

    @property
    def is_base_at_zero(self) -> bool:
        """Whether experts with B = 0 leave the base as it is: of a mixed block, the weights have to sum to 1."""
        return not self.mixes_blocks or self.sums_to_one

    @property
    def starts_as_base(self) -> bool:
        """Whether a new mixture computes what its base does."""
        return not self.imported and self.is_base_at_zero

    @property
    def grows(self) -> bool:
        """Whether ``add_expert`` is for it."""
        return self.routes and not self.imported


def changed(config: MoloraConfig, change: Callable[[Placement], Placement]) -> MoloraConfig:
    """The config with ``change`` made of each placement whose router chooses."""
    own = Traits(config).choosing
    return config.replace(placements=tuple(change(p) if p in own else p for p in config.placements))


def with_rules(config: MoloraConfig, change: Callable[[BalanceConfig], BalanceConfig]) -> MoloraConfig:
    """The config with ``change`` made of each balance rule."""
    return changed(config, lambda p: p.replace(balance=tuple(change(b) for b in p.balance)))


def strong(config: MoloraConfig) -> MoloraConfig:
    """The config with losses for balance at a coefficient of 1, at which a wrong one shows."""

    def weigh(b: BalanceConfig) -> BalanceConfig:
        rule = BALANCES[b.kind]
        return b.replace(coef=1.0) if b.coef > 0 and rule.measures_balance and not rule.needs_tasks else b

    return with_rules(config, weigh)


def still(config: MoloraConfig) -> MoloraConfig:
    """The config with biases that do not move: they move in whole steps, so that rounding could show."""
    return with_rules(config, lambda b: b.replace(rate=0.0) if BALANCES[b.kind].steers else b)


def _sums_to_one(gate: GateConfig) -> bool:
    if gate.capacity is not None:
        return False
    if gate.top_k is None:
        return gate.top_p is None and gate.activation == "softmax"
    return gate.renormalize in ("one", "softmax") or gate.hard_weight in ("one", "ste")


def takes(recipe: str, option: str) -> bool:
    """Whether the recipe has the option."""
    return option in inspect.signature(RECIPES[recipe]).parameters


def small(recipe: str) -> dict[str, Any]:
    """The recipe's own smallest options, without folders."""
    return dict(getattr(RECIPES[recipe], "tiny", {}))


@functools.cache
def _of_recipe(recipe: str) -> Traits:
    """Those of the small version; the adapters' folders do not count."""
    own = {"adapters": dict.fromkeys(ADAPTERS, "")} if takes(recipe, "adapters") else {}
    return Traits(RECIPES[recipe](**{**small(recipe), **own}))


def traits(of: Any) -> Traits:
    """The traits of a recipe's small version (by name), of a config, or of a converted model."""
    if isinstance(of, str):
        return _of_recipe(of)
    return Traits(of if isinstance(of, MoloraConfig) else of._molora.config)


def having(trait: Callable[[Traits], bool]) -> tuple[str, ...]:
    """The recipes whose small version has the trait, in the order of the table."""
    return tuple(r for r in RECIPES if trait(traits(r)))
