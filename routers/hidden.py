"""The model-wide head of X-LoRA: from the last hidden state of a scaling pass to gates for every site."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Self, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from molora.config import RouterConfig
from molora.config.options import GateOptions, RouterOptions
from molora.routers.base import Router
from molora.routers.gates import GATES
from molora.routing import ROUTER_DTYPE, Routing, as_dtype, autocast_on

__all__ = ["HiddenRouter"]


class HiddenRouter(Router):
    """``depth`` linears with ReLU and dropout between them, float32 (X-LoRA, arXiv 2402.07148, sec. II).

    ``layers``: hidden -> size -> ... -> E, or E * M with ``config.layerwise``, M = ``num_sites``.
    """

    sits = ("model",)

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        config: RouterConfig,
        gate_config: GateOptions,
        num_sites: int,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.config, self.gate_config = config, gate_config
        self.num_experts, self.num_sites = num_experts, num_sites
        out = num_experts * (num_sites if config.layerwise else 1)
        widths = [hidden_size, *[config.size] * (config.depth - 1), out]
        self.layers = nn.ModuleList(
            nn.utils.skip_init(nn.Linear, i, o, bias=config.bias, device=device or "cpu", dtype=ROUTER_DTYPE)
            for i, o in zip(widths[:-1], widths[1:], strict=True)
        )
        self.requires_grad_(config.train)

    @classmethod
    def tiny(cls) -> RouterOptions:
        """Two linears of width 8, a gate for each site."""
        return RouterConfig(kind="hidden", scope="model", bias=True, depth=2, size=8)

    def reset_parameters(self, generator: torch.Generator) -> None:
        """nn.Linear's own initialisation, from ``generator``."""
        with torch.no_grad():
            for layer in cast(list[nn.Linear], self.layers):
                bound = 1 / math.sqrt(layer.in_features)
                for p in layer.parameters():
                    p.uniform_(-bound, bound, generator=generator)

    @classmethod
    def grown(cls, options: RouterOptions) -> RouterOptions:
        """With biases, the last of which holds the new expert's logit."""
        return options.replace(bias=True)

    def resized(self, sources: Sequence[int | None], *options: Any) -> Self:
        """A head of this class whose expert e is ``sources[e]`` of this one, or a new one for None.

        The last linear has a row for each site and expert, the experts side by side. A new expert's rows are 0, and
        its biases the given logit; biases that were not there are 0.
        """
        config, gate_config, logit = options
        first = cast(nn.Linear, self.layers[0])
        new = type(self)(first.in_features, len(sources), config, gate_config, self.num_sites, first.weight.device)
        old, last = self.state_dict(), f"layers.{len(self.layers) - 1}."
        for name, t in new.state_dict().items():
            given = old.get(name)
            if not name.startswith(last):
                t.copy_(torch.zeros_like(t) if given is None else given)
                continue
            # (sites, experts) rows; without a bias before, one of zeros
            before = t.new_zeros(self.num_experts * len(t) // len(sources)) if given is None else given
            old_SE, new_SE = before.unflatten(0, (-1, self.num_experts)), t.unflatten(0, (-1, len(sources)))
            for e, source in enumerate(sources):
                new_one = logit if name == f"{last}bias" else 0.0
                new_SE[:, e] = new_one if source is None else old_SE[:, source]
        return new.train(self.training).requires_grad_(first.weight.requires_grad)

    def forward(self, hidden_BSD: Tensor) -> Tensor:
        """Logits (T, M, E), or (T, 1, E) without layerwise scalings; float32, autocast off."""
        h = hidden_BSD.flatten(0, -2).to(ROUTER_DTYPE)
        with torch.autocast(h.device.type, enabled=False) if autocast_on(h) else contextlib.nullcontext():
            for i, layer in enumerate(cast(list[nn.Linear], self.layers)):
                if i:
                    h = nn.functional.dropout(h.relu(), self.config.dropout, self.training)
                if layer.weight.dtype == ROUTER_DTYPE:
                    h = layer(h)  # called: the weights of an offloaded one are there only then
                    continue
                # The weights may be narrower or wider than float32 when the whole model was cast.
                bias = None if layer.bias is None else as_dtype(layer.bias, ROUTER_DTYPE)
                h = nn.functional.linear(h, as_dtype(layer.weight, ROUTER_DTYPE), bias)
        return rearrange(h, "t (m e) -> t m e", e=self.num_experts)

    def gates(self, hidden_BSD: Tensor) -> tuple[Routing, ...]:
        """One :class:`Routing` a site, from one gate over all of them."""
        logits_TME = self(hidden_BSD)
        top_k = self.gate_config.top_k
        assert top_k is None or isinstance(top_k, int)
        flat = GATES[self.gate_config.kind].route(logits_TME.flatten(0, 1), self.gate_config, top_k)
        tokens = logits_TME.shape[0]
        weights, ids, logits = (self._per_site(t, tokens) for t in (flat.weights, flat.ids, flat.logits))
        probs = weights if flat.probs is flat.weights else self._per_site(flat.probs, tokens)  # the same when dense
        parts = (weights, ids, probs, logits)
        sites = tuple(Routing(*(p[m] for p in parts)) for m in range(len(parts[0])))  # type: ignore[arg-type]
        return sites if self.config.layerwise else sites * self.num_sites

    def _per_site(self, flat: Tensor | None, tokens: int) -> tuple[Tensor | None, ...]:
        if flat is None:
            return (None,) * (self.num_sites if self.config.layerwise else 1)
        return rearrange(flat, "(t m) k -> m t k", t=tokens).unbind(0)
