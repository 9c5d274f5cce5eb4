"""No router: every expert always on at weight 1. Plain LoRA is one expert under this router."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.config import RouterConfig
from molora.config.options import GateOptions, RouterOptions
from molora.routers.base import Router
from molora.routing import ROUTER_DTYPE

__all__ = ["FixedRouter"]


class FixedRouter(Router):
    """Logits of 0 for every expert; sites skip it and use weight 1. No parameters."""

    chooses = False

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: RouterOptions,
        gate: GateOptions,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts

    @classmethod
    def tiny(cls) -> RouterOptions:
        """Nothing but the kind."""
        return RouterConfig(kind="fixed")

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Nothing to draw."""

    def forward(self, x_TI: Tensor) -> Tensor:
        """Zeros (T, E) in float32."""
        return x_TI.new_zeros(x_TI.shape[0], self.num_experts, dtype=ROUTER_DTYPE)
