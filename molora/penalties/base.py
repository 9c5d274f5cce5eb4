"""What every penalty is: its duties, and the defaults of most of them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from molora.config.options import PenaltyConfig, PenaltyOptions
from molora.layers.banks.plain import ExpertBank

__all__ = ["Penalty"]


class Penalty:
    """An entry of ``PENALTIES``: a scalar of one linear's parameters, which is summed over the linears.

    ``options``: the class of its options. ``parameters``: names of the bank's parameters that it looks at, all trained.
    """

    options: ClassVar[type[PenaltyOptions]] = PenaltyConfig
    parameters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def value(cls, options: Any, bank: ExpertBank, router: nn.Module | None) -> Tensor:
        """A scalar in float32, differentiable in the parameters of bank and router, which are whole here.

        ``router``: the linear's own, or None where another module owns it.
        """
        raise NotImplementedError(f"{cls.__name__}.value")

    @classmethod
    def tiny(cls) -> PenaltyOptions:
        """Options of a smallest penalty of this kind."""
        return cls.options()
