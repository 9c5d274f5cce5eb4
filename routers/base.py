"""What every router is: its duties, and the defaults of most of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn

from molora.config import RouterConfig
from molora.config.options import RouterOptions

__all__ = ["Router"]


class Router(nn.Module):
    """An entry of ``ROUTERS``: a module from x (T, I) to logits (T, E + X) in float32.

    X numbers a token come behind the logits where the gate asks for them (:attr:`molora.routers.gates.Gate.extras`).
    It is built as ``Router(in_features, num_experts, router_options, gate_options, device)``; one for a whole model as
    ``Router(hidden_size, num_experts, router_options, gate_options, num_sites, device)``, with a method ``gates`` as
    :class:`molora.routers.hidden.HiddenRouter` has it. For backward it keeps nothing but x in x's dtype. A parameter of
    one number has shape (1,): DeepSpeed cannot send one without a dimension.

    Class attributes: ``options``, the class of its options; ``chooses``, whether tokens are routed (if not, every
    expert is always on); ``sits``, the scopes it can have (``model`` needs a pass of the model first); ``steerable``,
    whether it may carry a bias that steers the choice; ``gives_extras``, whether it can give X > 0.
    """

    options: ClassVar[type[RouterOptions]] = RouterConfig
    chooses: ClassVar[bool] = True
    sits: ClassVar[tuple[str, ...]] = ("module", "block")
    steerable: ClassVar[bool] = False
    gives_extras: ClassVar[bool] = False

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw the parameters from ``generator`` alone; the global random state is not used."""
        raise NotImplementedError(f"{type(self).__name__}.reset_parameters")

    def resized(self, sources: Sequence[int | None], *options: Any) -> Self:
        """A router of this class, with its own options, whose expert e is ``sources[e]`` of this one; None: new.

        ``options``: those of router and gate, and the logit of a new expert.
        """
        raise NotImplementedError(f"{type(self).__name__}.resized")

    @classmethod
    def grown(cls, options: RouterOptions) -> RouterOptions:
        """The options after an expert joined, which starts at a logit of its own."""
        return options

    @classmethod
    def tiny(cls) -> RouterOptions:
        """Options of a smallest router of this class."""
        return cls.options()
