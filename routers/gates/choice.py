"""From logits to weights: activation, choice of experts, renormalisation, as pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.config import GateConfig
from molora.routers.gates.base import Gate
from molora.routing import ROUTER_DTYPE, Routing, as_dtype

__all__ = ["Choice", "gate"]


class Choice(Gate):
    """Activation, choice of experts, renormalisation: :func:`gate`."""

    @classmethod
    def tiny(cls) -> GateConfig:
        """Two experts a token, whose weights sum to 1."""
        return GateConfig(top_k=2, renormalize="one")

    @classmethod
    def choice_of(cls, options: GateConfig) -> str:
        """Fixed with a ``top_k``, variable with a ``top_p``, dense without both."""
        if options.top_p is not None:
            return "variable"
        return "dense" if options.top_k is None else "fixed"

    @classmethod
    def sums_to_one(cls, options: GateConfig) -> bool:
        """Where the chosen weights are made to."""
        return options.renormalize == "one"

    @classmethod
    def couples_tokens(cls, options: GateConfig) -> bool:
        """Where an expert's places are counted."""
        return options.capacity is not None

    @classmethod
    def route(
        cls,
        logits_TE: Tensor,
        options: GateConfig,
        top_k: int | None,
        *,
        extras_TX: Tensor | None = None,
        bias_E: Tensor | None = None,
        rows: int = 1,
    ) -> Routing:
        """See :func:`gate`."""
        return gate(logits_TE, options, top_k, bias_E, rows)


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
