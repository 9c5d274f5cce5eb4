"""Ways to start experts: drawn, from the frozen weight, or from data. A new one is a file here and a line in the table.

Starts from data are calls after ``convert`` (:mod:`~molora.initialisers.eva`, :mod:`~molora.initialisers.lora_ga`,
:mod:`~molora.initialisers.corda`); their entries say so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import nn

from molora import processes
from molora.config import Placement
from molora.initialisers.base import Initialiser
from molora.initialisers.drawn import Gaussian, Kaiming, Random
from molora.initialisers.from_weight import MiCA, OLoRA, Orthogonal, PiSSA
from molora.initialisers.not_options import EVA, CorDA, LoftQ, LoRAGA
from molora.layers.banks.plain import ExpertBank
from molora.layers.linear import MixtureLinear

__all__ = ["INITIALISERS", "Initialiser", "draw", "initialiser", "start_experts", "start_of"]

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


def draw(bank: ExpertBank, placement: Placement, generator: torch.Generator) -> None:
    """Fill a new bank from ``generator`` alone."""
    with torch.no_grad():
        start_of(placement).draw(bank, generator)


def start_experts(sites: Mapping[str, nn.Module], seed: int) -> None:
    """Start the banks whose placement asks for a start from the linear; banks on the meta device hold nothing to start.

    Raises:
        ConfigError: for ranks or base weights that the start cannot be computed from; PEFT not installed.
    """
    for path, site in sites.items():
        if not isinstance(site, MixtureLinear) or site.bank is None:
            continue
        found = start_of(site.placement)
        if found.needs_linear and site.bank.lora_A.device.type != "meta":
            with torch.no_grad(), processes.whole(getattr(site.base_layer, "weight", None)):
                found.start(site, site.bank, path, seed)
