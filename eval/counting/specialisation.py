"""What experts attend to: domains, each other, token ids, and whether choices have settled. Pure functions of counts.

Letters as in ``eval/counting/metrics.py``, and V: token ids, W: bootstrap resamples.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from molora.eval.counting.metrics import group_counts, load, mutual_information, permutation_p_value
from molora.eval.scoring.bootstrap import LEVEL

__all__ = [
    "coactivation",
    "divergence",
    "information",
    "lift",
    "saturation",
    "transition",
    "vocabulary_specialisation",
]


def _resamples(group_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """How often each document is drawn in each resample, (W, N) float64; each domain keeps its number of documents."""
    out_WN = torch.zeros(count, len(group_N), dtype=torch.float64)
    for g in group_N.unique():
        own = (group_N == g).nonzero().flatten()
        drawn = own[torch.randint(len(own), (count, len(own)), generator=generator)]
        out_WN.scatter_add_(1, drawn, torch.ones(drawn.shape, dtype=torch.float64))
    return out_WN


def information(
    counts_NME: Tensor, group_N: Tensor, permutations: int = 1000, resamples: int = 500, seed: int = 0
) -> dict[str, Any]:
    """:func:`permutation_p_value`, with ``interval``: 95 % bounds of the mean information, and ``above_chance``.

    Information of finite samples is biased upward, also that of a resample of them. The interval is the basic
    bootstrap's, ``2 * observed - quantiles`` over resampled documents, which takes the bias off: independent labels
    give an interval at 0. ``above_chance``: observed less the mean of the shuffled.
    """
    found = permutation_p_value(counts_NME, group_N, permutations, seed)
    groups, observed = int(group_N.max()) + 1, found["nmi"]
    generator = torch.Generator().manual_seed(seed)
    again = torch.stack(
        [
            mutual_information(group_counts(counts_NME * weight_N.view(-1, 1, 1), group_N, groups)).mean()
            for weight_N in _resamples(group_N, resamples, generator)
        ]
    )
    high, low = torch.quantile(again, torch.tensor(LEVEL, dtype=again.dtype)).tolist()
    bounds = [min(max(2 * observed - q, 0.0), 1.0) for q in (low, high)]
    return {**found, "above_chance": observed - found["chance"], "interval": bounds, "resamples": resamples}


def lift(counts_NME: Tensor, group_N: Tensor, resamples: int = 500, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """An expert's share of a domain's assignments over its mean share of the domains, and 95 % bounds; (G, M, E) each.

    Every domain weighs the same, however long it is. 1: the domain makes no difference. Bounds are percentiles over
    documents, resampled within their domain. An expert that is never used has lift 0.
    """
    groups = int(group_N.max()) + 1
    weights_WN = torch.cat(
        (
            torch.ones(1, len(group_N), dtype=torch.float64),
            _resamples(group_N, resamples, torch.Generator().manual_seed(seed)),
        )
    )
    of_group_WGN = weights_WN.unsqueeze(1) * torch.nn.functional.one_hot(group_N, groups).T
    share_WGME = load((of_group_WGN @ counts_NME.flatten(1)).unflatten(-1, counts_NME.shape[1:]))
    lift_WGME = share_WGME / share_WGME.mean(1, keepdim=True).clamp_min(1e-12)
    low, high = torch.quantile(lift_WGME[1:], torch.tensor(LEVEL, dtype=torch.float64), dim=0)
    return lift_WGME[0], low, high


def divergence(counts_GME: Tensor) -> Tensor:
    """Jensen-Shannon divergence of each two domains' loads over log 2, (M, G, G): 0 alike, 1 no expert in common."""
    p_MGE = load(counts_GME).transpose(0, 1)
    a, b = p_MGE.unsqueeze(2), p_MGE.unsqueeze(1)
    middle = (a + b) / 2

    def h(p: Tensor) -> Tensor:
        return -torch.xlogy(p, p).sum(-1)

    return ((h(middle) - (h(a) + h(b)) / 2) / torch.tensor(2.0).log()).clamp_min(0)


def coactivation(together_EE: Tensor) -> Tensor:
    """P(b | a), (E, E): of the tokens that chose a, the share that chose b as well, whatever their ranks.

    ``together_EE``: tokens by pair of experts, on the diagonal by expert. OLMoE's figure (arXiv 2409.02060) counts
    neighbouring ranks only; this counts all pairs. Rows of unused experts are 0.
    """
    return together_EE / together_EE.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clamp_min(1)


def transition(counts_EF: Tensor) -> Tensor:
    """P(favourite in the next layer | favourite in this one), rows sum to 1; rows of unused experts are 0."""
    return counts_EF / counts_EF.sum(-1, keepdim=True).clamp_min(1)


def vocabulary_specialisation(counts_VE: Tensor, least: int = 10, words: int = 10) -> dict[str, Any]:
    """OLMoE's (arXiv 2409.02060, sec. 5.4): share of an id's occurrences that go to its own top expert, mean over ids.

    Of ids seen at least ``least`` times. Returns ``share`` (None without such an id), ``ids``, how many, and by expert
    ``words``: the ids that it has most of, as (id, share, occurrences), by falling share, then occurrences, then id.
    """
    seen_V = counts_VE.sum(1)
    often = (seen_V >= least).nonzero().flatten()
    share_VE = counts_VE[often].double() / seen_V[often].unsqueeze(1)
    tables: list[list[tuple[int, float, int]]] = [[] for _ in range(counts_VE.shape[1])]
    tops = share_VE.argmax(1).tolist() if len(often) else []
    for n, e in enumerate(tops):
        tables[e].append((int(often[n]), float(share_VE[n, e]), int(seen_V[often[n]])))
    ranked = [sorted(t, key=lambda w: (-w[1], -w[2], w[0]))[:words] for t in tables]
    mean = float(share_VE.amax(1).mean()) if len(often) else None
    return {"share": mean, "ids": len(often), "words": ranked}


def saturation(early_TK: Tensor, late_TK: Tensor) -> float:
    """Share of the late checkpoint's choices that the early one made too, over the same tokens; order is ignored.

    OLMoE's router saturation, sec. 5.1: the mean over tokens of ``|early and late| / |late|``; -1 is an empty slot.
    Tokens without a choice in the late one do not count; by chance it is about K / E.
    """
    same_TK = ((late_TK.unsqueeze(2) == early_TK.unsqueeze(1)) & (late_TK >= 0).unsqueeze(2)).any(2)
    size_T = (late_TK >= 0).sum(1)
    used = size_T > 0
    return float((same_TK.sum(1)[used] / size_T[used]).double().mean()) if bool(used.any()) else 0.0
