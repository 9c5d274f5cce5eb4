"""Experts that look at different directions of their input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from molora.config.options import PenaltyConfig
from molora.layers.banks.plain import ExpertBank
from molora.penalties.base import Penalty

__all__ = ["Orthogonal"]


class Orthogonal(Penalty):
    """``sum over i < j of ||A_i A_j^T||_F^2`` of the experts of a linear (PEGO, arXiv 2403.14233, eq. 5).

    0 where the rows of different experts are orthogonal to each other; rows of one expert may be anything.
    """

    parameters = ("lora_A",)

    @classmethod
    def value(cls, options: PenaltyConfig, bank: ExpertBank, router: nn.Module | None) -> Tensor:
        """The sum above for A (R, in_features), in float32."""
        A_RI = bank.lora_A.float()
        owner_R = torch.tensor([e for e, r in enumerate(bank.ranks) for _ in range(r)], device=A_RI.device)
        apart_RR = owner_R.unsqueeze(0) > owner_R.unsqueeze(1)  # each pair of experts once
        return ((A_RI @ A_RI.T).square() * apart_RR).sum()
