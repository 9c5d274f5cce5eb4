"""A penalty that makes B sparse."""

from __future__ import annotations

from torch import Tensor, nn

from molora.config.options import PenaltyConfig
from molora.layers.banks.plain import ExpertBank
from molora.penalties import PENALTIES, Penalty


class Sparse(Penalty):
    """``sum |B|``."""

    parameters = ("lora_B",)

    @classmethod
    def value(cls, options: PenaltyConfig, bank: ExpertBank, router: nn.Module | None) -> Tensor:
        """The sum over one linear."""
        return bank.lora_B.float().abs().sum()

    @classmethod
    def tiny(cls) -> PenaltyConfig:
        """A coefficient that shows."""
        return PenaltyConfig(kind="sparse", coef=0.01)


PENALTIES["sparse"] = Sparse
