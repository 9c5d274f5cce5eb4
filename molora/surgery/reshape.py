"""Change the experts of a trained mixture: one more, or some less, with the parameters of the others bit for bit."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from molora.config import MoloraConfig, Placement
from molora.config.site import SiteConfig
from molora.config.strict import PerLayer, matches, shown
from molora.errors import ConfigError
from molora.initialisers import draw, start_of
from molora.layers.banks import Bank, banks_of
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import HEAD, Mixture
from molora.layers.routed import RoutedModule
from molora.routers import ROUTERS, Router
from molora.seeds import generator
from molora.surgery.install import sites_of

__all__ = ["NEW_LOGIT", "add_expert", "prune_experts"]

Sources = tuple[int | None, ...]  # by new expert: which one it was, None for a new one
NEW_LOGIT = -10.0  # exp(-10) is 5e-5: not chosen beside trained experts, and still far from underflow


@dataclass(frozen=True)
class _Change:
    """What each site's experts become, by site path; of one model."""

    model: nn.Module
    mixture: Mixture
    sources: Mapping[str, Sources]
    config: MoloraConfig
    logit: float
    seed: int


def add_expert(model: nn.Module, mixture: Mixture, logit: float, seed: int) -> None:
    """See :meth:`molora.model.MixtureModel.add_expert`."""
    routed = _routed(model, mixture, "add_expert")
    if any(mixture.config.placements[m.site.placement].imported for m in routed):
        raise ConfigError(
            f"add_expert: the experts of recipe {mixture.config.recipe!r} are ready-made adapters; convert the base "
            "with one more in adapters={name: folder}, its gates have to be learned again"
        )
    own = [m.placement for m in routed]
    stuck = [p.init_lora_weights for p in own if p.train_experts and not start_of(p).trains_B]
    if stuck:
        raise ConfigError(f"add_expert: B is not trained ({stuck[0]!r}), and a new one's is 0; convert with one more")
    if not matches(logit, float):
        raise ConfigError(f"add_expert: logit: got {shown(logit)}, expected a finite number")
    sources = {m.site.path: (*range(m.site.num_experts), None) for m in routed}
    placements = tuple(
        _grown(p.replace(router=ROUTERS[p.router.kind].grown(p.router)), 1) if _is_routed(p) else p
        for p in mixture.config.placements
    )
    _apply(_Change(model, mixture, sources, _with(mixture.config, placements, 1), logit, seed))


def prune_experts(model: nn.Module, mixture: Mixture, experts: Iterable[int] | Mapping[str, Iterable[int]]) -> None:
    """See :meth:`molora.model.MixtureModel.prune_experts`."""
    routed, config = _routed(model, mixture, "prune_experts"), mixture.config
    everywhere = None if isinstance(experts, Mapping) else _indices(experts, config)
    wanted = dict.fromkeys((m.site.path for m in routed), everywhere or set())
    if isinstance(experts, Mapping):
        wanted = _by_site(routed, {path: _indices(gone, config) for path, gone in experts.items()}, config)
    sources = {}
    for m in routed:
        gone = wanted.get(m.site.path, set())
        if any(not 0 <= e < m.site.num_experts for e in gone):
            raise ConfigError(
                f"prune_experts: {m.site.path}: got {sorted(gone)}, expected indices from 0 to {m.site.num_experts - 1}"
            )
        sources[m.site.path] = tuple(e for e in range(m.site.num_experts) if e not in gone)
        left, least = len(sources[m.site.path]), m.site.top_k or 1
        if left < least:
            raise ConfigError(
                f"prune_experts: {m.site.path}: {left} experts would be left, expected at least {least} (the top_k)"
            )
    if everywhere is not None:
        less = -len(everywhere)
        placements = tuple(_grown(p, less) if _is_routed(p) else p for p in config.placements)
        config = _with(config, placements, less)
        if config.adapters:
            config = config.replace(adapters=tuple(a for e, a in enumerate(config.adapters) if e not in everywhere))
    else:
        counts = {m.site.path: len(sources[m.site.path]) for m in routed}
        config = _with(config, tuple(_counted(p, i, routed, counts) for i, p in enumerate(config.placements)), 0)
    _apply(_Change(model, mixture, sources, config, 0.0, 0))


def _is_routed(p: Placement) -> bool:
    return ROUTERS[p.router.kind].chooses


def _routed(model: nn.Module, mixture: Mixture, what: str) -> list[RoutedModule]:
    """The sites whose experts a router chooses; those of a fixed router have one expert, always on."""
    sites = [m for _, m in sites_of(model).values()]
    routed = [m for m in sites if _is_routed(m.placement)]
    if not routed:
        raise ConfigError(f"{what}: recipe {mixture.config.recipe!r} has one expert that is always on, and no router")
    if any(m.placement.gate.partition > 1 for m in routed):
        raise ConfigError(f"{what}: got experts that share a logit (partition), expected a logit for each")
    if any(b.in_pieces or b.is_meta for m in routed for b in banks_of(m).values()):
        raise ConfigError(f"{what}: the experts are in pieces (an engine's), offloaded or on meta; change them before")
    return routed


def _indices(experts: Any, config: MoloraConfig) -> set[int]:
    try:
        return {operator.index(cast(Any, "") if isinstance(e, bool) else e) for e in experts}
    except TypeError as e:
        names = ", ".join(f"{i} is {n!r}" for i, (n, _) in enumerate(config.adapters)) or "from 0"
        raise ConfigError(f"prune_experts: got {shown(experts)}, expected a list of indices ({names[:500]})") from e


def _by_site(routed: list[RoutedModule], experts: Mapping[str, set[int]], config: MoloraConfig) -> dict[str, set[int]]:
    """Site path to the experts that go: the linears of a block lose those of its router."""
    leads = {m.site.path: m.site.block for m in routed if m.router is not None}
    unknown = [path for path in experts if path not in leads]
    if unknown or config.adapters:
        raise ConfigError(
            f"prune_experts: got {unknown[:3] or list(experts)[:3]}, expected "
            + ("a list of indices: the experts are adapters of the whole model" if config.adapters else "paths of ")
            + ("" if config.adapters else f"routers, such as {next(iter(leads), 'none')!r}")
        )
    blocks = {leads[path]: gone for path, gone in experts.items() if leads[path]}
    return {m.site.path: blocks.get(m.site.block) or experts.get(m.site.path, set()) for m in routed}


# The config, which tells how the mixture would be made; the sites say what it is


def _plus(value: PerLayer, more: int) -> PerLayer:
    return tuple(v + more for v in value) if isinstance(value, tuple) else value + more


def _grown(p: Placement, more: int) -> Placement:
    if p.imported:
        return p
    return p.replace(r=_plus(p.r, more)) if p.rank_one else p.replace(num_experts=_plus(p.num_experts, more))


def _with(config: MoloraConfig, placements: tuple[Placement, ...], more: int) -> MoloraConfig:
    patterns = config.rank_pattern
    if any(p.rank_one for p in placements):
        patterns = tuple((name, r + more) for name, r in patterns)
    return config.replace(placements=placements, rank_pattern=patterns)


def _counted(p: Placement, index: int, routed: Sequence[RoutedModule], counts: Mapping[str, int]) -> Placement:
    """The placement with the largest number of experts of each layer."""
    layers: dict[int, int] = {}
    for m in routed:
        if m.site.placement == index:
            layers[m.site.layer] = max(layers.get(m.site.layer, 0), counts[m.site.path])
    if not layers:
        return p
    values = tuple(layers[i] for i in sorted(layers))
    value: PerLayer = values[0] if len(set(values)) == 1 else values
    return p.replace(r=value) if p.rank_one else p.replace(num_experts=value)


# The modules


def _apply(change: _Change) -> None:
    """Build every new bank and router beside the model, then put them in."""
    modules = {m.site.path: m for _, m in sites_of(change.model).values()}
    sites = tuple(_site(s, change.sources.get(s.path)) for s in change.mixture.sites)
    made: list[tuple[RoutedModule, SiteConfig, Bank | None, nn.Module | None]] = []
    for site in sites:
        m, sources = modules[site.path], change.sources.get(site.path)
        bank, router = getattr(m, "bank", None), m.router
        if sources is not None:
            if bank is not None:
                rng = generator(change.seed, site.path, "bank", str(len(sources)))
                bank = bank.resized(site, sources, functools.partial(draw, start=start_of(m.placement), generator=rng))
            placement = change.config.placements[site.placement]
            if router is not None:
                router = cast(Router, router).resized(sources, placement.router, placement.gate, change.logit)
        made.append((m, site, bank, router))
    old_head = getattr(change.model, HEAD, None)
    head = None if old_head is None else _head(old_head, change)
    for m, site, bank, router in made:
        m.site, m.router, m.placement = site, router, change.config.placements[site.placement]
        if isinstance(m, MixtureLinear):
            m.use_bank(bank)
    if head is not None:
        setattr(change.model, HEAD, head)
    change.mixture.config, change.mixture.sites = change.config, sites


def _head(old: Router, change: _Change) -> Router:
    wide = next(p for p in change.config.placements if p.router.scope == "model")
    return old.resized(next(iter(change.sources.values())), wide.router, wide.gate, change.logit)


def _site(site: SiteConfig, sources: Sources | None) -> SiteConfig:
    if sources is None:
        return site

    def chosen(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return values if len(values) < 2 else tuple(values[0 if s is None else s] for s in sources)

    return site.replace(num_experts=len(sources), ranks=chosen(site.ranks), scales=chosen(site.scales))
