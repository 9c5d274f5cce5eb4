"""One linear map from a token to logits: the router of MixLoRA, MoLA, SMoRA, LLaVA-MoLE and MeteoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from molora.config import RouterConfig
from molora.config.options import GateOptions, RouterOptions
from molora.routers.bias import BiasedRouter
from molora.routers.gates import GATES
from molora.routing import ROUTER_DTYPE, as_dtype, autocast_on

__all__ = ["LinearRouter"]


class LinearRouter(BiasedRouter):
    """``logits = x W^T (+ b)`` in float32, whatever the dtype of x and with autocast off.

    x: (T, in_features). Returns (T, num_experts) float32; with ``gate.partition`` p, each of num_experts / p logits is
    repeated for p neighbours. W is kaiming-uniform like ``nn.Linear``, or N(0, ``config.init_std``). A gate that takes
    X numbers more a token gets ``x V^T`` behind the logits, V (X, in_features) drawn like W.
    """

    gives_extras = True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: RouterConfig,
        gate: GateOptions,
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
        extras = GATES[gate.kind].extras
        if extras:
            V = torch.empty(extras, in_features, dtype=ROUTER_DTYPE, device=device)
            self.extra_weight = nn.Parameter(V, requires_grad=config.train)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Draw W (and the bias, and V) anew; the global random state is not used."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        with torch.no_grad():
            for weight in (self.weight, *self._extra()):
                if self.config.init_std is None:
                    weight.uniform_(-bound, bound, generator=generator)
                else:
                    weight.normal_(0.0, self.config.init_std, generator=generator)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound, generator=generator)

    def _extra(self) -> tuple[Tensor, ...]:
        V = self._parameters.get("extra_weight")
        return () if V is None else (V,)

    @classmethod
    def grown(cls, options: RouterOptions) -> RouterOptions:
        """With a bias, which holds the new expert's logit."""
        return options.replace(bias=True)

    def resized(self, sources: Sequence[int | None], *options: Any) -> Self:
        """A router of this class whose expert e is ``sources[e]`` of this one, or a new one for None.

        A new expert's weight is 0 and its bias the given logit. Parameters and buffers with a row for each expert are
        dealt out, all others copied.
        """
        config, gate, logit = options
        device, own = self.weight.device, {**dict(self.named_parameters()), **dict(self.named_buffers())}
        new = type(self)(self.weight.shape[1], len(sources), config, gate, device).train(self.training)
        if self.select_bias is not None:
            new.add_select_bias(self.bias_rate, device)
        with torch.no_grad():
            for name, t in (*new.named_parameters(), *new.named_buffers()):
                fill = logit if name == "bias" else 0.0
                old = own.get(name, self.weight.new_zeros(self.num_experts))
                if old.shape != t.shape:  # a row for each expert
                    rows = [torch.full_like(old[:1], fill) if s is None else old[s : s + 1] for s in sources]
                    old = torch.cat(rows)
                if name != "load_counts":
                    t.copy_(old)
        return new.requires_grad_(self.weight.requires_grad)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Logits (T, E) in float32; with X numbers more for the gate, (T, E + X)."""
        if autocast_on(x_TI):
            with torch.autocast(x_TI.device.type, enabled=False):
                logits_TE = self._product(x_TI)
        else:
            logits_TE = self._product(x_TI)
        if self.partition != 1:
            logits_TE = logits_TE.repeat_interleave(self.partition, dim=-1)
        extra = self._extra()
        return torch.cat((logits_TE, self._numbers(x_TI, *extra)), 1) if extra else logits_TE

    @staticmethod
    def _numbers(x_TI: Tensor, V_XI: Tensor) -> Tensor:
        with torch.autocast(x_TI.device.type, enabled=False):
            return nn.functional.linear(as_dtype(x_TI, ROUTER_DTYPE), as_dtype(V_XI, ROUTER_DTYPE))

    def _product(self, x_TI: Tensor) -> Tensor:
        bias = None if self.bias is None else as_dtype(self.bias, ROUTER_DTYPE)
        return nn.functional.linear(as_dtype(x_TI, ROUTER_DTYPE), as_dtype(self.weight, ROUTER_DTYPE), bias)
