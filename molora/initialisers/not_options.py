"""Initialisers of PEFT that are no option of a recipe, each with what to do instead."""

from __future__ import annotations

from molora.initialisers.base import Initialiser

__all__ = ["EVA", "CorDA", "LoRAGA", "LoftQ"]

DATA = "it starts from data, which no option holds: convert with True, then call "


class CorDA(Initialiser):
    """See :mod:`molora.initialisers.corda`."""

    instead = DATA + "molora.initialisers.corda.init_corda(model, dataloader)"


class LoRAGA(Initialiser):
    """See :mod:`molora.initialisers.lora_ga`."""

    instead = DATA + "molora.initialisers.lora_ga.init_lora_ga(model, dataloader)"


class EVA(Initialiser):
    """See :mod:`molora.initialisers.eva`."""

    instead = DATA + "molora.initialisers.eva.init_eva(model, dataloader)"


class LoftQ(Initialiser):
    """Starts from what a quantised weight lost, so it needs another base."""

    instead = (
        "it replaces the base weight by a quantised one and starts from what that lost; load the base quantised, "
        "and convert it with True"
    )
