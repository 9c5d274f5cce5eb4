"""A bank whose experts start at a part of the base's weight and take that start back."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from molora.config.site import SiteConfig
from molora.config.strict import shown
from molora.errors import ConfigError
from molora.layers.banks.base import Bank
from molora.layers.banks.plain import ExpertBank

__all__ = ["FrozenRanksBank", "with_start_taken_back"]


class FrozenRanksBank(ExpertBank):
    """Experts that start at ``B0 A0 != 0`` and take their start back, each under its own gate.

    ``g s (B A - B0 A0) x``: the mixture starts at the base whatever the gates are, and the base keeps its weights. That
    is the same sum over twice the ranks: ``frozen_A`` (R, in_features) holds A0 and ``frozen_B`` (out_features, R)
    holds -B0, and packed, expert e is [A_e; A0_e] and [B_e, -B0_e]. All experts have one rank.
    """

    dims = {**ExpertBank.dims, "frozen_A": "RI", "frozen_B": "OR"}
    output = (*ExpertBank.output, "frozen_B")
    frozen = ("frozen_A", "frozen_B")
    words = {**ExpertBank.words, "frozen_A": "frozen ranks", "frozen_B": "frozen ranks"}
    for_stacked = False  # their starts are of linears' weights

    frozen_A: Tensor
    frozen_B: Tensor

    @classmethod
    def packed_ranks(cls, site: SiteConfig) -> tuple[int, ...]:
        """Twice each expert's rank."""
        return tuple(2 * r for r in site.expert_ranks())

    @classmethod
    def faults(cls, site: SiteConfig) -> list[str]:
        """Unequal ranks, which could not be cut apart without an index."""
        one = len(set(site.ranks)) == 1
        return [] if one else [f"bank: got ranks {shown(site.ranks)}, expected one rank for all experts"]

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """A start that is taken back."""
        return {**super().tiny(), "init_lora_weights": "pissa"}

    def pack(self) -> tuple[Tensor, Tensor]:
        """One copy each: all experts have one rank, so they can be cut apart without an index."""
        each = (len(self.ranks), self.ranks[0])
        A_ErI = self.lora_A.unflatten(0, each), self.frozen_A.unflatten(0, each)
        B_OEr = self.lora_B.unflatten(1, each), self.frozen_B.unflatten(1, each)
        return torch.cat(A_ErI, 1).flatten(0, 1), torch.cat(B_OEr, 2).flatten(1)

    def expert(self, expert: int) -> tuple[Tensor, Tensor, float]:
        """A_e, B_e and the scale of one expert, of rank 2 r_e: with its frozen ranks."""
        A_rI, B_Or, A0_rI, minus_B0_Or = self.views(expert).values()
        return torch.cat((A_rI, A0_rI)), torch.cat((B_Or, minus_B0_Or), 1), self.scales[expert]

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Nothing to take back yet."""
        with torch.no_grad():
            self.frozen_A.zero_()
            self.frozen_B.zero_()

    @torch.no_grad()
    def take_start_back(self) -> None:
        """Make the experts as they are now the start that their frozen ranks take back: the sum is zero from here."""
        self.frozen_A.copy_(self.lora_A)
        self.frozen_B.copy_(-self.lora_B)


def with_start_taken_back(bank: Bank, site: SiteConfig) -> FrozenRanksBank:
    """The bank of the same experts, its trained parameters themselves, that takes them back as they are now.

    Raises:
        ConfigError: for a bank of another kind than the two that hold A and B of each expert.
    """
    if type(bank) not in (ExpertBank, FrozenRanksBank):
        raise ConfigError(
            f"{site.path}: got a {type(bank).__name__}, expected a plain bank: only A and B as they stand can be taken "
            "back; take another start, or leave the placement's bank at 'plain'"
        )
    if not isinstance(bank, FrozenRanksBank):
        plain = cast(ExpertBank, bank)
        A_RI = plain.lora_A
        bank = FrozenRanksBank(site, train=False, dtype=A_RI.dtype, device=A_RI.device).train(plain.training)
        bank.lora_A, bank.lora_B = plain.lora_A, plain.lora_B
    bank.take_start_back()
    return bank
