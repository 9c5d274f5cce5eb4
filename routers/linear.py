"""One linear map from a token to logits: the router of MixLoRA, MoLA, SMoRA, LLaVA-MoLE and MeteoRA."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from molora.config import GateConfig, RouterConfig
from molora.routers.bias import BiasedRouter
from molora.routing import ROUTER_DTYPE, as_dtype, autocast_on

__all__ = ["LinearRouter"]


class LinearRouter(BiasedRouter):
    """``logits = x W^T (+ b)`` in float32, whatever the dtype of x and with autocast off.

    x: (T, in_features). Returns (T, num_experts) float32; with ``gate.partition`` p, each of num_experts / p logits is
    repeated for p neighbours. W is kaiming-uniform like ``nn.Linear``, or N(0, ``config.init_std``).
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: RouterConfig,
        gate: GateConfig,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_experts)
        self.config, self.partition = config, gate.partition
        shape = (num_experts // gate.partition, in_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=ROUTER_DTYPE, device=device), requires_grad=config.train)
        self.bias = (
            nn.Parameter(torch.empty(shape[0], dtype=ROUTER_DTYPE, device=device), requires_grad=config.train)
            if config.bias
            else None
        )

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw W (and the bias) anew; the global random state is not used."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            if self.config.init_std is None:
                self.weight.uniform_(-bound, bound, generator=generator)
            else:
                self.weight.normal_(0.0, self.config.init_std, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Logits (T, E) in float32."""
        if autocast_on(x_TI):
            with torch.autocast(x_TI.device.type, enabled=False):
                logits_TE = self._product(x_TI)
        else:
            logits_TE = self._product(x_TI)
        return logits_TE if self.partition == 1 else logits_TE.repeat_interleave(self.partition, dim=-1)

    def _product(self, x_TI: Tensor) -> Tensor:
        bias = None if self.bias is None else as_dtype(self.bias, ROUTER_DTYPE)
        return nn.functional.linear(as_dtype(x_TI, ROUTER_DTYPE), as_dtype(self.weight, ROUTER_DTYPE), bias)
