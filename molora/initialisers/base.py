"""What every start of experts is: its duties, and the defaults of most of them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch

if TYPE_CHECKING:
    from molora.layers.banks.plain import ExpertBank
    from molora.layers.linear import MixtureLinear

__all__ = ["Initialiser"]


class Initialiser:
    """An entry of ``INITIALISERS``: values of A and B, in two steps. Every converted model begins as what the base is.

    ``draw`` fills a bank from a seed alone, also the experts that join later. ``start`` then may put values in their
    place that depend on the frozen linear; it is called once, at the end of the conversion.

    Class attributes: ``about``, in words for a message; ``name``, how a user writes it there; ``trains_B``, or A alone;
    ``takes_back``, whether ``B0 A0 != 0`` is taken back by frozen ranks; ``needs_linear``, whether ``start`` looks at
    the linear; ``in_halves``, whether it needs even ranks; ``in_steps``, whether it is also written ``_niter_16``;
    ``instead``: for a start that no option can hold, what to do.
    """

    about: ClassVar[str] = ""
    name: ClassVar[str] = ""
    instead: ClassVar[str] = ""
    trains_B: ClassVar[bool] = True
    takes_back: ClassVar[bool] = False
    needs_linear: ClassVar[bool] = False
    in_halves: ClassVar[bool] = False
    in_steps: ClassVar[bool] = False

    @classmethod
    def draw(cls, bank: ExpertBank, generator: torch.Generator) -> None:
        """A uniform in +-1/sqrt(in_features) (kaiming, as PEFT), B zero; from ``generator`` alone, without gradient."""
        bound = 1 / math.sqrt(max(bank.lora_A.shape[1], 1))
        bank.lora_A.uniform_(-bound, bound, generator=generator)
        bank.lora_B.zero_()

    @classmethod
    def start(cls, m: MixtureLinear, bank: ExpertBank, path: str, seed: int) -> None:
        """Nothing more; else values for ``bank``, whose linear is whole and on its own device here.

        Raises:
            ConfigError: for ranks or a weight that the start cannot be computed from.
        """
