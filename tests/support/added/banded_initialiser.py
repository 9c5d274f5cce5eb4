"""A start in which each rank reads a band of the input of its own."""

from __future__ import annotations

import torch

from molora.initialisers import INITIALISERS, Initialiser
from molora.layers.banks.plain import ExpertBank


class Banded(Initialiser):
    """Row j of A is normal on every R-th input feature from j, zero elsewhere; B zero."""

    about = "A in bands of the input"

    @classmethod
    def draw(cls, bank: ExpertBank, generator: torch.Generator) -> None:
        """See the class."""
        A_RI = bank.lora_A
        A_RI.normal_(0.0, 1.0, generator=generator)
        row, column = torch.arange(A_RI.shape[0]).unsqueeze(1), torch.arange(A_RI.shape[1])
        A_RI.mul_((column % A_RI.shape[0] == row).to(A_RI))
        bank.lora_B.zero_()


INITIALISERS["banded"] = Banded
