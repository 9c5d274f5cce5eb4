"""A router by the cosine between a token and each expert's vector, with an option of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from molora.config.options import GateOptions, RouterOptions
from molora.config.strict import at_least
from molora.routers import GATES, ROUTERS, BiasedRouter


@dataclass(frozen=True, kw_only=True)
class CosineConfig(RouterOptions):
    """``sharpness``: what the cosine is multiplied by at the start; it is learned."""

    kind: str = "cosine"
    sharpness: float = 4.0

    def faults(self) -> list[str]:
        """Values out of range."""
        return super().faults() + at_least("sharpness", self.sharpness, 1e-3)


class Cosine(BiasedRouter):
    """``logits = t cos(x, w_e) + b_e`` in float32; x (T, I), w (E, I), b (E,), t learned.

    A gate's numbers beside the logits are cosines, too.
    """

    options, gives_extras = CosineConfig, True

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        config: CosineConfig,
        gate: GateOptions,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(num_experts)
        self.config, self.gate = config, gate
        self.weight = nn.Parameter(torch.empty(num_experts, in_features, device=device), requires_grad=config.train)
        self.offset = nn.Parameter(torch.zeros(num_experts, device=device), requires_grad=config.train)
        self.sharpness = nn.Parameter(torch.empty(1, device=device), requires_grad=config.train)
        extras = torch.empty(GATES[gate.kind].extras, in_features, device=device)
        self.more = nn.Parameter(extras, requires_grad=config.train) if len(extras) else None

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Directions at random; the sharpness as configured."""
        with torch.no_grad():
            self.weight.normal_(0.0, 1 / math.sqrt(self.weight.shape[1]), generator=generator)
            self.sharpness.fill_(self.config.sharpness)
            self.offset.zero_()
            if self.more is not None:
                self.more.normal_(0.0, 1 / math.sqrt(self.weight.shape[1]), generator=generator)

    def resized(self, sources: Sequence[int | None], *options: Any) -> Self:
        """Rows of the kept experts as they are; a new one looks nowhere and has the given logit."""
        config, gate, logit = options
        new = type(self)(self.weight.shape[1], len(sources), config, gate, self.weight.device).train(self.training)
        if self.select_bias is not None:
            new.add_select_bias(self.bias_rate, self.weight.device)
        with torch.no_grad():
            new.sharpness.copy_(self.sharpness)
            if self.more is not None and new.more is not None:
                new.more.copy_(self.more)
            for e, source in enumerate(sources):
                new.weight[e] = 0.0 if source is None else self.weight[source]
                new.offset[e] = logit if source is None else self.offset[source]
                if new.select_bias is not None and self.select_bias is not None:
                    new.select_bias[e] = 0.0 if source is None else self.select_bias[source]
        return new.requires_grad_(self.weight.requires_grad)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Logits (T, E), and what the gate takes beside them."""
        with torch.autocast(x_TI.device.type, enabled=False):
            x_TI, w_EI = (nn.functional.normalize(t.float(), dim=-1) for t in (x_TI, self.weight))
            logits_TE = self.sharpness.float() * x_TI @ w_EI.T + self.offset.float()
            if self.more is None:
                return logits_TE
            return torch.cat((logits_TE, x_TI @ nn.functional.normalize(self.more.float(), dim=-1).T), 1)


ROUTERS["cosine"] = Cosine
