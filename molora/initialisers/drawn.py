"""Starts that are drawn from the seed alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from molora.initialisers.base import Initialiser

if TYPE_CHECKING:
    from molora.layers.banks.plain import ExpertBank

__all__ = ["Gaussian", "Kaiming", "Random"]


class Kaiming(Initialiser):
    """A uniform in +-1/sqrt(in_features), B zero: PEFT's default."""

    name, about = "True", "kaiming A and zero B"


class Gaussian(Initialiser):
    """A normal with std 1/r of its expert, B zero."""

    about = "normal A of std 1/r"

    @classmethod
    def draw(cls, bank: ExpertBank, generator: torch.Generator) -> None:
        """See the class."""
        bank.lora_A.normal_(0.0, 1.0, generator=generator)
        rank_R = torch.tensor([r for r in bank.ranks for _ in range(r)], device=bank.lora_A.device)
        bank.lora_A.div_(rank_R.unsqueeze(-1))
        bank.lora_B.zero_()


class Random(Initialiser):
    """Kaiming A, and B uniform in +-1/sqrt(r), so that every expert does something from the start: for tests."""

    name, about = "False", "B random too, for tests"

    @classmethod
    def draw(cls, bank: ExpertBank, generator: torch.Generator) -> None:
        """See the class."""
        super().draw(bank, generator)
        width = 1 / math.sqrt(max(max(bank.ranks, default=1), 1))
        bank.lora_B.uniform_(-width, width, generator=generator)
