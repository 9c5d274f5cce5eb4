"""Routing: where each token goes; and the one legend of dimension letters.

Dimension legend, used as suffixes in all tensor code (``weights_TK`` is a (T, K) tensor):

    B  sequences (rows) of the batch          S  tokens of a sequence           T  tokens, B * S
    D  width of the model                     I  in_features of a linear        O  out_features of a linear
    F  width inside a feed-forward block      E  experts                        K  experts chosen per token
    R  ranks of all experts side by side      r  rank of one expert             M  adapted modules (sites)
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ROUTER_DTYPE", "Routing", "as_dtype", "autocast_on", "dense_weights"]

ROUTER_DTYPE = torch.float32  # ST-MoE (arXiv 2202.08906) sec. 3.2: half-precision routers diverge


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, which costs microseconds also where it changes nothing."""
    return t if t.dtype == dtype else t.to(dtype)


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for the device of ``x``."""
    return not x.is_meta and torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


class Routing:
    """Where each token goes. Everything in float32 but the ids.

    ``weights``: (T, K). ``ids``: (T, K) int64, -1 where a slot is empty (its weight is 0); None when every expert is
    used, and then the weights are (T, E). ``probs``: (T, E), the distribution before selection; given as None, it is
    the softmax of ``logits / temperature``, computed when somebody asks. ``logits``: (T, E).
    """

    def __init__(
        self, weights: Tensor, ids: Tensor | None, probs: Tensor | None, logits: Tensor, temperature: float = 1.0
    ) -> None:
        self.weights, self.ids, self.logits = weights, ids, logits
        self._probs, self.temperature = probs, temperature
        self._rows: Tensor | None = None

    @property
    def has_probs(self) -> bool:
        """Whether the probabilities were given, or were asked for before."""
        return self._probs is not None

    @property
    def probs(self) -> Tensor:
        """The distribution over all experts, (T, E)."""
        if self._probs is not None:
            return self._probs
        probs_TE = (self.logits / self.temperature).softmax(-1)
        if probs_TE.requires_grad == self.logits.requires_grad:  # not what somebody asked for under no_grad
            self._probs = probs_TE
        return probs_TE

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    def decided(self, weights: Tensor, ids: Tensor | None) -> Routing:
        """The same router's probabilities with another decision."""
        return Routing(weights, ids, self._probs, self.logits, self.temperature)

    def beside(self, always: int) -> Routing:
        """The same decision with so many experts more behind the others, each of weight 1 for every token.

        For the experts' sum alone: it has no probabilities, and its logits are zeros that tell the number of experts.
        """
        T, E = self.weights.shape[0], self.num_experts
        ones_TN = self.weights.new_ones(T, always)
        weights_TK, ids_TK = torch.cat((self.weights, ones_TN), 1), self.ids
        if ids_TK is not None:
            more_N = torch.arange(E, E + always, device=ids_TK.device)
            ids_TK = torch.cat((ids_TK, more_N.expand(T, always)), 1)
        return Routing(weights_TK, ids_TK, None, self.weights.new_zeros(()).expand(T, E + always))

    def slots(self) -> Tensor:
        """The choices as one-hot rows, (T, K, E) float32; a row of zeros for an empty slot."""
        experts_E = torch.arange(self.num_experts, device=self.logits.device)
        return (self.slot_ids().unsqueeze(-1) == experts_E).to(ROUTER_DTYPE)

    def slot_rows(self) -> Tensor:
        """The expert of each slot with E for an empty one, (T * K,) int64: rows of a table. Computed once."""
        if self._rows is None:
            self._rows = self.slot_ids().remainder(self.num_experts + 1).reshape(-1)
        return self._rows

    def slot_ids(self) -> Tensor:
        """The expert of each slot, (T, K) int64; when every expert is used, slot e is expert e."""
        if self.ids is not None:
            return self.ids
        T, E = self.logits.shape
        return torch.arange(E, device=self.logits.device).expand(T, E)

    def dense(self) -> Tensor:
        """The weights as (T, E), zero for experts that were not chosen."""
        return dense_weights(self.weights, self.ids, self.num_experts)


def dense_weights(weights_TK: Tensor, ids_TK: Tensor | None, num_experts: int) -> Tensor:
    """Spread (T, K) weights over (T, E); empty slots (id -1) add nothing. Differentiable in the weights."""
    if ids_TK is None:
        return weights_TK
    zeros_TE = weights_TK.new_zeros(weights_TK.shape[0], num_experts)
    return zeros_TE.scatter_add(1, ids_TK.clamp_min(0), weights_TK)
