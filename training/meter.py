"""How the routers spread the tokens while a model trains: counted on the device, summed over processes, in few numbers.

Works as a tape of :func:`molora.context.taping`, so it changes nothing that the model computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from molora import processes
from molora.routing import Routing

__all__ = ["RoutingMeter", "SiteLoad", "warnings_of"]

COLLAPSED = 0.95  # share of the picks that the K favourite experts take
PATIENCE = 3  # logs in a row without a pick after which an expert is called dead


@dataclass(frozen=True)
class SiteLoad:
    """One router over some steps. ``load``: share of the picks by expert; ``choices``: K, or E where all are used;
    ``token_entropy``: mean entropy of a token's probabilities over log E (1: undecided, 0: certain).
    """

    site: str
    load: tuple[float, ...]
    choices: int
    tokens: int
    token_entropy: float

    @property
    def entropy(self) -> float:
        """Entropy of the load over log E: 1 when balanced, 0 when collapsed."""
        return -sum(f * math.log(f) for f in self.load if f > 0) / math.log(len(self.load))

    @property
    def max_violation(self) -> float:
        """``max_e f_e E - 1`` (MaxVio, arXiv 2408.15664, eq. 4): 0 when balanced, E - 1 when collapsed."""
        return max(self.load) * len(self.load) - 1


class RoutingMeter:
    """Counts of every router with at least two experts since the last :meth:`take`.

    ``experts``: number of experts by site. Processes sum over this list, whatever each of them happened to see.
    """

    def __init__(self, experts: Mapping[str, int]) -> None:
        self.experts = {site: experts[site] for site in sorted(experts) if experts[site] > 1}
        self._seen: list[tuple[str, Routing, Tensor]] = []
        self._sums: dict[str, tuple[int, Tensor]] = {}
        self.outer: Any = None  # the tape that this one stands before, if somebody records as well

    def add(self, site: str, routing: Routing, valid_BS: Tensor) -> None:
        """The tape's side: keep what one router decided in this forward until :meth:`digest`."""
        if self.outer is not None:
            self.outer.add(site, routing, valid_BS)
        if site in self.experts:
            self._seen.append((site, routing, valid_BS))

    @torch.no_grad()
    def digest(self) -> None:
        """Add the forward's decisions to the counts; routers of one shape together."""
        alike: dict[tuple[Any, ...], list[tuple[str, Routing, Tensor]]] = defaultdict(list)
        for seen in self._seen:
            _, routing, valid_BS = seen
            ids, logits = routing.ids, routing.logits
            alike[logits.shape, logits.device, None if ids is None else ids.shape, valid_BS.shape].append(seen)
        self._seen = []
        for group in alike.values():
            for (site, routing, _), sums in zip(group, _sums_of(group), strict=True):
                K = routing.num_experts if routing.ids is None else routing.ids.shape[1]
                before = self._sums.get(site)
                self._sums[site] = K, sums if before is None else before[1] + sums

    def take(self, device: torch.device) -> list[SiteLoad]:
        """The load of every router that ran, over all processes, and start anew. Every process has to call it."""
        if not self.experts:
            return []
        own = {site: (E, torch.zeros(E + 2, dtype=_wide(device))) for site, E in self.experts.items()} | self._sums
        rest = processes.total(torch.cat([sums.to(device) for _, sums in own.values()])).tolist()
        out = []
        for site, (K, _) in own.items():
            E = self.experts[site]
            *counts, entropy, tokens = rest[: E + 2]
            rest, picks = rest[E + 2 :], max(sum(counts), 1e-12)
            if tokens:
                load = tuple(c / picks for c in counts)
                out.append(SiteLoad(site, load, min(K, E), int(tokens), entropy / tokens / math.log(E)))
        self._sums = {}
        return out


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's devices do not have


def _sums_of(group: list[tuple[str, Routing, Tensor]]) -> Tensor:
    """(M, E + 2): picks by expert (weights where every expert is used), sum of token entropies, tokens."""
    device = group[0][1].logits.device
    dtype = _wide(device)
    valid_MT = torch.stack([v.reshape(-1).to(device) for _, _, v in group]).to(dtype)
    probs_MTE = torch.stack([r.probs for _, r, _ in group]).to(dtype)
    weights_MTK = torch.stack([r.weights.detach() for _, r, _ in group]).to(dtype)
    probs_MTE = torch.where(valid_MT.unsqueeze(-1) > 0, probs_MTE, 0.0)
    E = probs_MTE.shape[-1]
    if group[0][1].ids is None:
        picks_ME = (torch.where(valid_MT.unsqueeze(-1) > 0, weights_MTK, 0.0)).abs().sum(1)
    else:
        ids_MTK = torch.stack([r.slot_ids() for _, r, _ in group])
        counted_MTK = valid_MT.unsqueeze(-1) * (ids_MTK >= 0)
        picks_ME = valid_MT.new_zeros(len(group), E)
        picks_ME.scatter_add_(1, ids_MTK.clamp_min(0).flatten(1), counted_MTK.flatten(1))
    p_MTE = probs_MTE / probs_MTE.sum(-1, keepdim=True).clamp_min(1e-12)  # sigmoid gates do not sum to 1
    entropy_M1 = -torch.xlogy(p_MTE, p_MTE).sum((1, 2)).unsqueeze(-1)
    return torch.cat((picks_ME, entropy_M1, valid_MT.sum(1, keepdim=True)), -1)


def warnings_of(loads: list[SiteLoad], idle: dict[tuple[str, int], int], told: set[tuple[str, int]]) -> list[str]:
    """Plain words about routers that collapsed and experts that died, each said once.

    ``idle`` counts for each (site, expert) the logs in a row without a pick, ``told`` what was said; both are kept by
    the caller and changed here. An expert of -1 stands for the whole router.
    """
    out = []
    for s in loads:
        favourites = sorted(range(len(s.load)), key=lambda e, s=s: -s.load[e])[: s.choices]  # type: ignore[misc]
        share = sum(s.load[e] for e in favourites)
        if s.choices < len(s.load) and share > COLLAPSED and (s.site, -1) not in told:
            told.add((s.site, -1))
            out.append(
                f"{s.site}: routing has collapsed: {share:.0%} of the picks go to {_names(favourites)} of "
                f"{len(s.load)}. Raise the balance coefficient, lower the router's learning rate, or use fewer experts"
            )
        for e, f in enumerate(s.load):
            idle[s.site, e] = 0 if f > 0 else idle.get((s.site, e), 0) + 1
        dead = [e for e in range(len(s.load)) if idle[s.site, e] >= PATIENCE and (s.site, e) not in told]
        if dead:
            told.update((s.site, e) for e in dead)
            out.append(
                f"{s.site}: no token has chosen {_names(dead)} of {len(s.load)} since {PATIENCE} logs: it is dead"
            )
    return out


def _names(experts: list[int]) -> str:
    return ("expert " if len(experts) == 1 else "experts ") + ", ".join(map(str, experts))
