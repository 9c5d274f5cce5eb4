"""Ways to start experts: drawn, from the frozen weight, or from data. A new one is a file here and a line in the table.

Starts from data are calls after ``convert`` (:mod:`~molora.initialisers.eva`, :mod:`~molora.initialisers.lora_ga`,
:mod:`~molora.initialisers.corda`); their entries say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from molora import processes
from molora.config import Placement
from molora.errors import ConfigError
from molora.initialisers.base import Initialiser
from molora.initialisers.drawn import Gaussian, Kaiming, Random
from molora.initialisers.from_weight import MiCA, OLoRA, Orthogonal, PiSSA
from molora.initialisers.not_options import EVA, CorDA, LoftQ, LoRAGA
from molora.layers.banks import Bank
from molora.layers.banks.plain import ExpertBank
from molora.layers.linear import MixtureLinear

__all__ = ["INITIALISERS", "Initialiser", "draw", "initialiser", "start_experts", "start_of", "trains"]

INITIALISERS: dict[str, type[Initialiser]] = {
    "kaiming": Kaiming,
    "random": Random,
    "gaussian": Gaussian,
    "orthogonal": Orthogonal,
    "mica": MiCA,
    "pissa": PiSSA,
    "olora": OLoRA,
    "corda": CorDA,
    "lora_ga": LoRAGA,
    "eva": EVA,
    "loftq": LoftQ,
}
IN_STEPS = re.compile("(.+)_niter_[0-9]{1,3}")  # the same by that many steps of an approximation


def initialiser(init_lora_weights: str) -> type[Initialiser] | None:
    """The entry of a placement's start, with or without a number of steps; None where there is none of the name."""
    in_steps = IN_STEPS.fullmatch(init_lora_weights)
    if in_steps is None:
        return INITIALISERS.get(init_lora_weights)
    found = INITIALISERS.get(in_steps[1])
    return found if found is not None and found.in_steps else None


def start_of(placement: Placement) -> type[Initialiser]:
    """The entry of a placement whose names were checked."""
    found = initialiser(placement.init_lora_weights)
    assert found is not None, placement.init_lora_weights
    return found


def trains(placement: Placement) -> tuple[bool, bool]:
    """Whether the placement's experts are trained, and B with them."""
    return placement.train_experts, placement.train_experts and start_of(placement).trains_B


def draw(bank: Bank, start: type[Initialiser], generator: torch.Generator) -> None:
    """Fill a new bank from ``generator`` alone: what is the bank's own, then A and B as ``start`` does."""
    with torch.no_grad():
        bank.reset_parameters(generator)
        if "lora_A" in bank.dims:
            start.draw(cast(ExpertBank, bank), generator)


def start_experts(sites: Mapping[str, nn.Module], seed: int) -> None:
    """Start the banks whose placement asks for a start from the linear; banks on the meta device hold nothing to start.

    Raises:
        ConfigError: for ranks or base weights that the start cannot be computed from; PEFT not installed.
    """
    for path, site in sites.items():
        if not isinstance(site, MixtureLinear) or site.bank is None:
            continue
        found = start_of(site.placement)
        if not found.needs_linear:
            continue
        if "lora_A" not in site.bank.dims:
            raise ConfigError(
                f"init_lora_weights={site.placement.init_lora_weights!r}: {path} has a {type(site.bank).__name__}, "
                "expected experts of A and B; leave the placement's bank at 'plain'"
            )
        if not site.bank.is_meta:
            with torch.no_grad(), processes.whole(getattr(site.base_layer, "weight", None)):
                found.start(site, cast(ExpertBank, site.bank), path, seed)
