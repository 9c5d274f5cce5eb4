"""What every gate is: its duties, and the defaults of most of them."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from molora.config import GateConfig
from molora.config.options import GateOptions
from molora.routing import Routing

__all__ = ["Gate"]


class Gate:
    """An entry of ``GATES``: from a router's logits to weights and ids, as functions without a state.

    Class attributes: ``options``, the class of its options; ``extras``, how many numbers a token it takes from the
    router besides the logits; ``choice``: ``"fixed"`` (K = ``top_k`` experts a token), ``"variable"``, ``"dense"``.
    """

    options: ClassVar[type[GateOptions]] = GateConfig
    extras: ClassVar[int] = 0
    choice: ClassVar[str] = "dense"

    @classmethod
    def choice_of(cls, options: Any) -> str:
        """``choice``, for these options."""
        return cls.choice

    @classmethod
    def sums_to_one(cls, options: Any) -> bool:
        """Whether the weights of each token sum to 1."""
        return False

    @classmethod
    def couples_tokens(cls, options: Any) -> bool:
        """Whether a token's weights depend on other tokens of its row."""
        return False

    @classmethod
    def route(
        cls,
        logits_TE: Tensor,
        options: Any,
        top_k: int | None,
        *,
        extras_TX: Tensor | None = None,
        bias_E: Tensor | None = None,
        rows: int = 1,
    ) -> Routing:
        """The :class:`Routing` of T tokens, float32, differentiable in logits and extras.

        ``top_k``: the layer's own K. ``bias_E`` steers the choice. ``rows``: B, for what is counted per sequence.
        """
        raise NotImplementedError(f"{cls.__name__}.route")

    @classmethod
    def tiny(cls) -> GateOptions:
        """Options of a smallest gate of this kind."""
        return cls.options()
