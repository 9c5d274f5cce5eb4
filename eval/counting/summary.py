"""The section "routing" of an evaluation: everything that recorded counts say, as one JSON value."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.eval.counting.metrics import (
    coefficient_of_variation,
    dead,
    effective_experts,
    entropy,
    group_counts,
    load,
    max_violation,
)
from molora.eval.counting.specialisation import (
    coactivation,
    divergence,
    information,
    lift,
    saturation,
    transition,
    vocabulary_specialisation,
)
from molora.eval.counting.stats import RoutingStats, Sample
from molora.eval.document import plain

__all__ = ["SCHEMA", "saturation_of", "summary"]

SCHEMA = 1
FEW = 3  # digits of what comes in large tables
MOST_SHOWN = 1_000_000  # choices of tokens in all sampled documents together


def summary(stats: RoutingStats, seed: int = 0, permutations: int = 1000, resamples: int = 500) -> dict[str, Any]:
    """Balance, specialisation, co-activation and samples as plain values; the same counts and seed give the same bytes.

    Lists by site are in the order of ``sites``, lists by domain in that of ``domains``. ``specialisation`` and ``lift``
    are None with a single domain. What a site has nothing to say about (co-activation and near
    ties where every expert is used, co-activation of a single choice, anything where no token came) is None.

    Raises:
        ConfigError: when nothing was counted.
    """
    if not stats.units:
        raise ConfigError("summary: nothing was recorded: got no token at a router with a choice of experts")
    counts_NME, group_N = stats.padded()
    names = stats.domains()
    counts_GME = group_counts(counts_NME, group_N, len(names))
    per_site = [_site(stats, i) for i in range(len(stats.sites))]
    several = len(names) > 1
    found = information(counts_NME, group_N, permutations, resamples, seed) if several else None
    section = {
        "schema": SCHEMA,
        "seed": seed,
        "sites": [
            {
                "path": s.path,
                "layer": s.layer,
                "kind": s.kind,
                "experts": s.experts,
                "choices": s.choices,
                "stream": s.stream,
            }
            for s in stats.sites
        ],
        "domains": {name: {"documents": int((group_N == g).sum())} for g, name in enumerate(names)},
        "documents_pooled": stats.bits < 64,
        "load": {name: _by_site(stats, load(counts_GME[g])) for g, name in enumerate(names)},
        **{key: [site[key] for site in per_site] for key in per_site[0]},
        "specialisation": found,
        "divergence": divergence(counts_GME) if several else None,
        "lift": _lift(stats, counts_NME, group_N, names, resamples, seed) if several else None,
        "transitions": [
            {"from": a, "to": b, "share": plain(transition(counts), FEW)}
            for (a, b), counts in zip(stats.pairs, stats.transitions, strict=True)
        ],
        "vocabulary": [{"site": i, **vocabulary_specialisation(t)} for i, t in sorted(stats.vocabulary.items())],
        "samples": [_sample(s) for s in _shown(stats)],
    }
    out: dict[str, Any] = plain(section)
    return out


def _site(stats: RoutingStats, index: int) -> dict[str, Any]:
    """Numbers of one site over all domains."""
    info, s = stats.sites[index], stats.site(index)
    tokens, pairs, batches = float(s["tokens"]), float(s["pairs"]), float(s["batches"])
    load_E, E = load(s["picks"]), info.experts
    mean_E = s["importance"] / max(tokens, 1)

    def of(value: Any, count: float = tokens) -> Any:
        return value / count if count else None

    return {
        "tokens": int(tokens),
        "load_of_all": load_E,
        "importance": mean_E,
        "cv": float(coefficient_of_variation(load_E)) if tokens else None,
        "max_violation": float(max_violation(load_E)) if tokens else None,
        "max_violation_of_a_batch": of(float(s["batch_violation"]), batches),
        "least_load": float(load_E.min()) if tokens else None,
        "dead": dead(load_E).nonzero().flatten().tolist() if tokens else None,
        "effective_experts": float(effective_experts(load_E)) if tokens else None,
        "entropy_of_load": float(entropy(load_E)) if tokens else None,
        "entropy_of_mean": float(entropy(mean_E)) if tokens else None,
        "mean_entropy": of(float(s["entropy"]) / math.log(E)),
        "repeat_rate": of(float(s["repeats"]), pairs),
        "near_ties": None if info.dense else of(float(s["ties"])),
        "coactivation": None if info.dense or info.choices < 2 else plain(coactivation(s["together"]), FEW),
    }


def _by_site(stats: RoutingStats, value_ME: Tensor) -> list[Tensor]:
    """Without the columns beyond each site's experts."""
    return [value_ME[i, : site.experts] for i, site in enumerate(stats.sites)]


def _lift(
    stats: RoutingStats, counts_NME: Tensor, group_N: Tensor, names: list[str], resamples: int, seed: int
) -> dict[str, Any]:
    bounds = lift(counts_NME, group_N, resamples, seed)
    return {
        name: {
            key: _by_site(stats, value_GME[g]) for key, value_GME in zip(("value", "low", "high"), bounds, strict=True)
        }
        for g, name in enumerate(names)
    }


def _shown(stats: RoutingStats) -> list[Sample]:
    """The sampled documents, fewer of each domain where all would make the file too large; each domain has one."""
    ranked: dict[str, list[Sample]] = {}
    for sample in sorted(stats.samples.values(), key=lambda s: s.rank):
        ranked.setdefault(sample.domain, []).append(sample)
    most = max((sum(w.numel() for _, _, w in s.picks) for s in stats.samples.values()), default=1)
    each = max(MOST_SHOWN // (most * len(ranked)), 1) if ranked else 0
    return [s for domain in sorted(ranked) for s in ranked[domain][:each]]


def _sample(sample: Sample) -> dict[str, Any]:
    sites = [
        {"site": i, "experts": ids_TK, "weights": plain(weights_TK.float(), FEW)}
        for i, (ids_TK, weights_TK) in sorted(_choices(sample).items())
    ]
    return {"domain": sample.domain, "tokens": sample.tokens, "sites": sites}


def _choices(sample: Sample) -> dict[int, tuple[Tensor, Tensor]]:
    """The chunks of each site put together: ids and weights (t, K)."""
    chunks: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for sites, ids_MTK, weights_MTK in sample.picks:
        for m, i in enumerate(sites):
            chunks.setdefault(i, []).append((ids_MTK[m], weights_MTK[m]))
    return {i: (torch.cat([a for a, _ in own]), torch.cat([b for _, b in own])) for i, own in chunks.items()}


def saturation_of(early: RoutingStats, late: RoutingStats) -> list[float | None]:
    """Per site, :func:`saturation` of two checkpoints of one model over the sampled documents that both recorded.

    Recordings with one seed sample the same documents of the same data. None where a site shares no token.

    Raises:
        ConfigError: when the sites differ or no document is in both.
    """
    both = sorted(early.samples.keys() & late.samples.keys())
    if early.sites != late.sites or not both:
        raise ConfigError(
            f"saturation: got {len(both)} documents in common over {len(early.sites)} and {len(late.sites)} sites, "
            "expected recordings of one model's checkpoints on the same data with the same seed and options"
        )
    found: list[list[tuple[Tensor, Tensor]]] = [[] for _ in early.sites]
    for key in both:
        first, second = _choices(early.samples[key]), _choices(late.samples[key])
        for i in first.keys() & second.keys():
            if len(first[i][0]) == len(second[i][0]):
                found[i].append((first[i][0], second[i][0]))
    return [
        saturation(torch.cat([a for a, _ in own]), torch.cat([b for _, b in own])) if own else None for own in found
    ]
