"""Routing: from logits to weights, as pure functions; and the one legend of dimension letters.

Dimension legend, used as suffixes in all tensor code (``weights_TK`` is a (T, K) tensor):

    B  sequences (rows) of the batch          S  tokens of a sequence           T  tokens, B * S
    D  width of the model                     I  in_features of a linear        O  out_features of a linear
    F  width inside a feed-forward block      E  experts                        K  experts chosen per token
    R  ranks of all experts side by side      r  rank of one expert             M  adapted modules (sites)
"""

from __future__ import annotations

import torch
from torch import Tensor

from molora.config import GateConfig

__all__ = ["ROUTER_DTYPE", "Routing", "as_dtype", "autocast_on", "dense_weights", "gate"]

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


def gate(
    logits_TE: Tensor,
    config: GateConfig,
    top_k: int | None,
    bias_E: Tensor | None = None,
    rows: int = 1,
) -> Routing:
    """Turn router logits into a :class:`Routing`.

    p = activation(logits / temperature); the choice is the ``top_k`` largest of p (+ ``bias_E``, which steers the
    choice only, unless ``bias_in_weight``), ties to the lower id; then renormalisation. Cost and shapes do not depend
    on the values. ``top_k`` is the layer's own K (None: dense). ``rows`` is B, for a capacity per sequence.
    """
    logits_TE = as_dtype(logits_TE, ROUTER_DTYPE)
    if top_k is not None and bias_E is None and config.activation == "softmax" and config.renormalize == "one":
        return _softmax_of_chosen(logits_TE, config, top_k, rows)
    probs_TE = _activate(logits_TE, config)
    if config.top_p is not None:
        weights_TK, ids_TK = _nucleus(probs_TE, config.top_p)
        return Routing(weights_TK, ids_TK, probs_TE, logits_TE)
    if top_k is None:
        return Routing(probs_TE, None, probs_TE, logits_TE)
    scores_TE = probs_TE if bias_E is None else probs_TE + bias_E
    ids_TK = scores_TE.detach().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = (scores_TE if config.bias_in_weight else probs_TE).gather(1, ids_TK)
    weights_TK = _harden(_renormalize(weights_TK, config.renormalize), config.hard_weight)
    if config.capacity is not None:
        weights_TK, ids_TK = _limit(weights_TK, ids_TK, config.capacity, logits_TE.shape[-1], rows)
    return Routing(weights_TK, ids_TK, probs_TE, logits_TE)


def _softmax_of_chosen(logits_TE: Tensor, config: GateConfig, top_k: int, rows: int) -> Routing:
    """Softmax over all, top-k, renormalised to 1: as a value, the softmax over the chosen logits."""
    scaled_TE = logits_TE if config.temperature == 1.0 else logits_TE / config.temperature
    sorted_TE, order_TE = scaled_TE.sort(dim=-1, descending=True, stable=True)
    ids_TK, weights_TK = order_TE[:, :top_k], _harden(sorted_TE[:, :top_k].softmax(-1), config.hard_weight)
    if config.capacity is not None:
        weights_TK, ids_TK = _limit(weights_TK, ids_TK, config.capacity, logits_TE.shape[-1], rows)
    return Routing(weights_TK, ids_TK, None, logits_TE, config.temperature)


def _activate(logits_TE: Tensor, config: GateConfig) -> Tensor:
    if config.temperature != 1.0:
        logits_TE = logits_TE / config.temperature
    if config.activation == "softmax":
        return logits_TE.softmax(-1)
    return logits_TE.sigmoid() if config.activation == "sigmoid" else logits_TE


def _renormalize(weights_TK: Tensor, mode: str) -> Tensor:
    if mode == "softmax":
        return weights_TK.softmax(-1)
    if mode == "none":
        return weights_TK
    total_T1 = weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
    weights_TK = weights_TK / total_T1
    return weights_TK * weights_TK.shape[-1] if mode == "top_k" else weights_TK


def _harden(weights_TK: Tensor, mode: str) -> Tensor:
    if mode == "prob":
        return weights_TK
    ones = torch.ones_like(weights_TK)
    return ones if mode == "one" else weights_TK - weights_TK.detach() + ones


def _nucleus(probs_TE: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Experts in falling order until their probabilities reach ``top_p``, the one that crosses it included."""
    sorted_TE, ids_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    keep_TE = sorted_TE.cumsum(-1) - sorted_TE < top_p
    return sorted_TE * keep_TE, torch.where(keep_TE, ids_TE, -1)


def _limit(weights_TK: Tensor, ids_TK: Tensor, capacity: int, num_experts: int, rows: int) -> tuple[Tensor, Tensor]:
    """Drop the picks of an expert beyond its first ``capacity`` tokens of each sequence."""
    picks_BSKE = torch.nn.functional.one_hot(ids_TK, num_experts).view(rows, -1, ids_TK.shape[1], num_experts)
    before_BSKE = picks_BSKE.flatten(1, 2).cumsum(1).view_as(picks_BSKE)
    place_TK = (before_BSKE * picks_BSKE).sum(-1).view_as(ids_TK)
    keep_TK = place_TK <= capacity
    return weights_TK * keep_TK, torch.where(keep_TK, ids_TK, -1)
