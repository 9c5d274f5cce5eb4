"""The plain bank: the packed A and B of one linear's LoRA experts."""

from __future__ import annotations

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
