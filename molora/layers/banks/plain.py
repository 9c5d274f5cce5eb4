"""The plain bank: the packed A and B of one linear's LoRA experts."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from molora.config.site import SiteConfig
from molora.errors import AdapterError
from molora.layers.banks.base import Bank

__all__ = ["ExpertBank"]


class ExpertBank(Bank):
    """Experts of ranks r_e side by side: ``lora_A`` (R, in_features), ``lora_B`` (out_features, R), R = sum of r_e.

    Expert e owns rows ``offset[e] : offset[e + 1]`` of A and the same columns of B; ranks may differ and may be 0.
    """

    dims = {"lora_A": "RI", "lora_B": "OR"}
    output: ClassVar[tuple[str, ...]] = ("lora_B",)
    words = {"lora_A": "A", "lora_B": "B"}

    lora_A: Tensor
    lora_B: Tensor

    @classmethod
    def copied(cls, site: SiteConfig) -> int:
        """None, where A and B are the parameters themselves."""
        return 0 if cls.pack is ExpertBank.pack else super().copied(site)

    def pack(self) -> tuple[Tensor, Tensor]:
        """The parameters themselves."""
        parameters: Any = self._parameters
        return parameters["lora_A"], parameters["lora_B"]

    def reset_parameters(self, generator: torch.Generator, init: str) -> None:
        """Draw A, and B for ``init="random"`` (else zero), from ``generator`` alone.

        ``kaiming``: A uniform in +-1/sqrt(in_features), as PEFT; ``gaussian``: A normal with std 1/r of its expert.
        """
        bound = 1 / math.sqrt(max(self.lora_A.shape[1], 1))
        with torch.no_grad():
            if init == "gaussian":
                self.lora_A.normal_(0.0, 1.0, generator=generator)
                rank_R = torch.tensor([r for r in self.ranks for _ in range(r)], device=self.lora_A.device)
                self.lora_A.div_(rank_R.unsqueeze(-1))
            else:
                self.lora_A.uniform_(-bound, bound, generator=generator)
            if init == "random":
                width = 1 / math.sqrt(max(max(self.ranks, default=1), 1))
                self.lora_B.uniform_(-width, width, generator=generator)
            else:
                self.lora_B.zero_()

    @torch.no_grad()
    def set_expert(self, expert: int, A_rI: Tensor, B_Or: Tensor) -> None:
        """Copy one expert's A and B in.

        Raises:
            AdapterError: when the shapes are not those of this expert.
        """
        views = self.views(expert)
        A, B = views["lora_A"], views["lora_B"]
        if A.shape != A_rI.shape or B.shape != B_Or.shape:
            raise AdapterError(
                f"expert {expert}: got A {tuple(A_rI.shape)} and B {tuple(B_Or.shape)}, "
                f"expected {tuple(A.shape)} and {tuple(B.shape)}"
            )
        A.copy_(A_rI)
        B.copy_(B_Or)
