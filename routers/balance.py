"""Balance rules: what a router reports in a training forward, and the auxiliary loss made of it.

Each rule has two parts. ``observe`` turns routings into small (B, ...) tensors, ``rows`` turns those into one value a
row. Routings wait for the end of the forward, where all routers of one shape are observed at once: a dozen small
operations at each of hundreds of routers would cost more than the routing itself. The loss is ``sum_b w_b value_b``
with w_b = n_b / N (predicted labels of row b over those of the whole step), averaged over routers: additive over rows,
micro-batches and ranks. f and P of the Switch loss are averages, so their product is additive only if both are taken
per row (scope ``sequence``); scope ``batch`` takes them over the forward's tokens, as published, and depends on the
micro-batch. There f is taken over the tokens of all processes, so each of them has to run its forward.

A rule's ``shared`` are the places of the tensors (of those that ``observe`` gives) that are taken so; they carry no
gradient. ``at_router``: observed at its router in the forward, not at the end. ``measures_balance``: its mean is part
of the model's ``aux_loss``. ``needs_tasks``: it learns from task ids. ``steers``: it needs a router with a bias.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from molora import processes
from molora.config import BalanceConfig
from molora.context import Observation, Report
from molora.routers.bias import BiasedRouter
from molora.routing import Routing

__all__ = ["BALANCES", "Seen", "combine", "observe_all", "picks"]


class Seen(NamedTuple):
    """What a rule may look at: the routing, real tokens (B, S) bool, task ids (B, S) or None, and the router."""

    routing: Routing
    valid_BS: Tensor
    task_BS: Tensor | None
    router: BiasedRouter | None
    recompute: bool


def picks(routing: Routing, count: str) -> Tensor:
    """How often each token picked each expert, (T, E) float32: its first choice (dropped or not), or all."""
    ids_TK = routing.ids
    if ids_TK is None or count == "argmax":
        ids_TK = routing.logits.argmax(-1, keepdim=True)
    zeros_TE = torch.zeros_like(routing.logits)
    return zeros_TE.scatter_add(1, ids_TK.clamp_min(0), (ids_TK >= 0).to(zeros_TE.dtype))


def _row_mean(values_TE: Tensor, valid_BS: Tensor) -> Tensor:
    """Mean over the valid tokens of each row: (T, ...) to (B, ...); 0 for a row without any."""
    share_BS = valid_BS / valid_BS.sum(1, keepdim=True).clamp_min(1)
    # A padded row of a base model may hold NaN, which a weight of 0 would keep.
    clean_BSE = torch.where(valid_BS.unsqueeze(-1), values_TE.view(*valid_BS.shape, -1), 0)
    return torch.bmm(share_BS.unsqueeze(1), clean_BSE).squeeze(1)


class Switch:
    """``E sum_e f_e P_e`` (Switch Transformers, arXiv 2101.03961, eq. 4): 1 at balance, E at collapse."""

    at_router, shared = False, (0,)
    measures_balance, needs_tasks, steers = True, False, False

    @staticmethod
    def observe(config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """f and P per row, (B, E) each."""
        valid_BS = seen.valid_BS if config.mask_padding else torch.ones_like(seen.valid_BS)
        with torch.no_grad():
            f_BE = _row_mean(picks(seen.routing, config.count), valid_BS)
            if config.count == "picks":
                f_BE = f_BE / f_BE.sum(-1, keepdim=True).clamp_min(torch.finfo(f_BE.dtype).tiny)
        return f_BE, _row_mean(seen.routing.probs, valid_BS)

    @staticmethod
    def rows(config: BalanceConfig, num_experts: int, f: Tensor, p: Tensor) -> Tensor:
        """Values (...,) of f and p (..., E)."""
        return (f * p).sum(-1) * (num_experts if config.factor == "experts" else 1)


class ZLoss:
    """``mean_t (logsumexp logits_t)^2`` (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small."""

    at_router, shared = False, ()
    measures_balance, needs_tasks, steers = False, False, False

    @staticmethod
    def observe(config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """The row means, (B, 1)."""
        z_T1 = seen.routing.logits.logsumexp(-1, keepdim=True).square()
        return (_row_mean(z_T1, seen.valid_BS),)

    @staticmethod
    def rows(config: BalanceConfig, num_experts: int, z: Tensor) -> Tensor:
        """Values (...,) of z (..., 1)."""
        return z.squeeze(-1)


class Supervised:
    """Cross entropy of the router to the task's expert (MeteoRA, arXiv 2405.13053, sec. 3.3); -100 = no label."""

    at_router, shared = False, ()
    measures_balance, needs_tasks, steers = True, True, False

    @staticmethod
    def observe(config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """The mean over a row's labelled tokens, (B, 1); None when the batch has no task ids."""
        if seen.task_BS is None:
            return None
        logits_BSE = seen.routing.logits.view(*seen.valid_BS.shape, -1)
        task_BS = seen.task_BS.masked_fill(~seen.valid_BS, -100)
        if config.shift:
            logits_BSE, task_BS = logits_BSE[:, :-1], task_BS[:, 1:]
        ce_BS = functional.cross_entropy(logits_BSE.transpose(1, 2), task_BS, ignore_index=-100, reduction="none")
        return (ce_BS.sum(1, keepdim=True) / (task_BS != -100).sum(1, keepdim=True).clamp_min(1),)

    @staticmethod
    def rows(config: BalanceConfig, num_experts: int, ce: Tensor) -> Tensor:
        """Values (...,) of ce (..., 1)."""
        return ce.squeeze(-1)


class Bias:
    """Loss-free balancing: no loss, only counts for :meth:`molora.routers.bias.BiasedRouter.update_bias`."""

    at_router, shared = True, ()
    measures_balance, needs_tasks, steers = False, False, True

    @staticmethod
    def observe(config: BalanceConfig, seen: Seen) -> tuple[Tensor, ...] | None:
        """Add the picks of this forward to the router's counts, once: a checkpoint's recompute does not count."""
        if seen.router is not None and seen.router.load_counts is not None and not seen.recompute:
            with torch.no_grad():
                picks_TE = picks(seen.routing, "picks")
                if config.mask_padding:
                    picks_TE = picks_TE * seen.valid_BS.reshape(-1, 1)
                seen.router.load_counts += picks_TE.sum(0)
        return None

    @staticmethod
    def rows(config: BalanceConfig, num_experts: int, *tensors: Tensor) -> Tensor:
        """Never called: the rule leaves no observation."""
        raise AssertionError("the bias rule has no loss")


BALANCES: dict[str, type[Switch] | type[ZLoss] | type[Supervised] | type[Bias]] = {
    "switch": Switch,
    "z": ZLoss,
    "supervised": Supervised,
    "bias": Bias,
}


def observe_all(config: BalanceConfig, reports: list[Report]) -> list[Observation]:
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


def combine(config: BalanceConfig, seen: list[Observation], weight_B: Tensor) -> tuple[Tensor, Tensor]:
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


def _values(config: BalanceConfig, pools: list[list[Observation]]) -> list[tuple[Tensor, Tensor]]:
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
