"""From what the routers of a forward report to the value of a balance rule, over all of them.

Routings wait for the end of the forward, where all routers of one shape are observed at once: a dozen small
operations at each of hundreds of routers would cost more than the routing itself. The loss is ``sum_b w_b value_b``
with w_b = n_b / N (predicted labels of row b over those of the whole step), averaged over routers: additive over rows,
micro-batches and ranks. f and P of the Switch loss are averages, so their product is additive only if both are taken
per row (scope ``sequence``); scope ``batch`` takes them over the forward's tokens, as published, and depends on the
micro-batch. There f is taken over the tokens of all processes, so each of them has to run its forward.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from molora import processes
from molora.config.options import BalanceOptions
from molora.context import Observation, Report
from molora.routers.balance.base import Seen
from molora.routers.balance.table import BALANCES
from molora.routing import Routing

__all__ = ["combine", "observe_all"]


def observe_all(config: BalanceOptions, reports: list[Report]) -> list[Observation]:
    """What the rule saw at each router, in the order of the reports; routers of one shape go as one larger batch."""
    alike: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, r in enumerate(reports):
        ids = r.routing.ids
        logits = r.routing.logits
        form = (logits.shape, logits.device, None if ids is None else ids.shape, r.routing.temperature)
        alike[(*form, r.stream, r.valid_BS.shape)].append(i)
    out: dict[int, Observation] = {}
    for group in alike.values():
        first, routings, M = reports[group[0]], [reports[i].routing for i in group], len(group)
        task_BS = None if first.task_BS is None else first.task_BS.repeat(M, 1)
        counted_BS = first.valid_BS if config.mask_padding else torch.ones_like(first.valid_BS)
        seen = Seen(_as_one(routings), first.valid_BS.repeat(M, 1), task_BS, None, False)
        tensors = BALANCES[config.kind].observe(config, seen)
        if tensors is None:
            continue
        per_router = zip(*(t.unflatten(0, (M, -1)).unbind(0) for t in tensors), strict=True)
        for i, own in zip(group, per_router, strict=True):
            r, valid_B = reports[i], counted_BS.sum(1) if i == group[0] else out[group[0]].valid_B
            out[i] = Observation(r.site, r.layer, r.rule, r.routing.num_experts, own, valid_B)
    return [out[i] for i in sorted(out)]


def _as_one(routings: list[Routing]) -> Routing:
    """Routings of one shape and one rule, one below the other, (M * T, ...); probabilities nobody asked for stay so."""
    ids = [r.ids for r in routings if r.ids is not None]
    probs = [r.probs for r in routings] if any(r.has_probs for r in routings) else None
    return Routing(
        torch.cat([r.weights for r in routings]),
        torch.cat(ids) if ids else None,
        None if probs is None else torch.cat(probs),
        torch.cat([r.logits for r in routings]),
        routings[0].temperature,
    )


def combine(config: BalanceOptions, seen: list[Observation], weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """The rule's loss over all routers (without its coefficient) and its plain mean, both scalars.

    ``weight_B``: n_b / N. The loss weighs rows by it; the mean weighs them by n_b / sum(n), so that it reads 1 at
    balance whatever the step. An observation with other rows (images) shares the total weight evenly.
    """
    pools: dict[tuple[int, ...], list[Observation]] = defaultdict(list)
    for i, o in enumerate(seen):
        place = {"router": i, "layer": o.layer, "model": 0}[config.pooling]
        pools[place, o.num_experts, o.valid_B.shape[0]].append(o)
    values = _values(config, list(pools.values()))
    losses, means = [], []
    for value_PB, valid_B in values:
        w_B = weight_B if weight_B.shape == valid_B.shape else (weight_B.sum() / valid_B.numel()).expand(valid_B.shape)
        total = w_B.sum()
        share_B = torch.where(total > 0, w_B / total.clamp_min(torch.finfo(w_B.dtype).tiny), torch.zeros_like(w_B))
        if config.scope == "batch":
            losses.append(value_PB[:, 0] * total)
            means.append(value_PB[:, 0])
        else:
            losses.append((value_PB * w_B).sum(-1))
            means.append((value_PB * share_B).sum(-1))
    loss, mean = torch.cat(losses), torch.cat(means)
    return (loss.sum() if config.reduction == "sum" else loss.mean()), mean.mean()


def _values(config: BalanceOptions, pools: list[list[Observation]]) -> list[tuple[Tensor, Tensor]]:
    """Values of pools that share shapes, stacked: (pools, B), or (pools, 1) in batch scope; and their valid counts."""
    alike: dict[tuple[int, ...], list[list[Observation]]] = defaultdict(list)
    for pool in pools:
        alike[len(pool), pool[0].num_experts, pool[0].valid_B.shape[0]].append(pool)
    out = []
    for (_, num_experts, _), group in alike.items():
        valid_B = group[0][0].valid_B
        stacked = [
            torch.stack(
                [
                    torch.stack([o.tensors[i] for o in pool]).mean(0) if len(pool) > 1 else pool[0].tensors[i]
                    for pool in group
                ]
            )
            for i in range(len(group[0][0].tensors))
        ]
        if config.scope == "batch":
            shared = BALANCES[config.kind].shared
            stacked = [_pooled(t, valid_B, everywhere=i in shared) for i, t in enumerate(stacked)]
        out.append((BALANCES[config.kind].rows(config, num_experts, *stacked), valid_B))
    return out


def _pooled(t_PBX: Tensor, valid_B: Tensor, everywhere: bool) -> Tensor:
    """Mean over the tokens of this forward, (pools, 1, ...), or over those of the same forward in every process."""
    sum_P1X, tokens = (t_PBX * valid_B.unsqueeze(-1)).sum(1, keepdim=True), valid_B.sum()
    if everywhere:
        sum_P1X, tokens = processes.total(sum_P1X), processes.total(tokens)
    return sum_P1X / tokens.clamp_min(1)
