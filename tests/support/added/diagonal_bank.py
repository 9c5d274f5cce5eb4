"""A bank with a third parameter: a factor for each rank."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.layers.banks import BANKS
from molora.layers.banks.plain import ExpertBank


class Diagonal(ExpertBank):
    """Expert e is ``s B_e diag(d_e) A_e``: ``diagonal`` (R,) beside A and B."""

    dims = {**ExpertBank.dims, "diagonal": "R"}
    diagonal: Tensor

    def pack(self) -> tuple[Tensor, Tensor]:
        """``diag(d) A`` and B."""
        return self.diagonal.unsqueeze(-1) * self.lora_A, self.lora_B

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Ones."""
        self.diagonal.fill_(1.0)

    @torch.no_grad()
    def set_expert(self, expert: int, A_rI: Tensor, B_Or: Tensor) -> None:
        """A plain LoRA has ones."""
        super().set_expert(expert, A_rI, B_Or)
        self.views(expert)["diagonal"].fill_(1.0)


BANKS["diagonal"] = Diagonal
