"""Every wrapper of a mixture, made beside a model that stays as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from molora.config import MoloraConfig, Placement
from molora.config.site import SiteConfig
from molora.errors import ConfigError, TargetError, nearest
from molora.initialisers import Initialiser, draw, start_of, trains
from molora.layers.banks import Bank, bank_class
from molora.layers.ffn import FFNDown, FFNRows, FFNUp
from molora.layers.linear import HALF, MixtureLinear
from molora.layers.mixture import HEAD, Owner
from molora.layers.routed import RoutedModule
from molora.layers.saved import SavedModule
from molora.layers.stacked import FusedExperts, FusedParameter
from molora.layers.wrapper import Wrapper
from molora.recipes.check import check
from molora.routers import BALANCES, ROUTERS, BiasedRouter, Router
from molora.seeds import generator
from molora.surgery.target_parameters import owner_of

__all__ = ["Built", "build"]

ROLES: dict[str, type[MixtureLinear]] = {"linear": MixtureLinear, "up": FFNUp, "down": FFNDown}


@dataclass
class Built:
    """Wrappers that stand ready beside an unchanged model, in the order they go in."""

    config: MoloraConfig
    sites: tuple[SiteConfig, ...]
    owner: Owner
    modules: dict[str, Wrapper]
    head: Router | None

    def routed(self) -> dict[str, RoutedModule]:
        """The sites by path."""
        return {path: site for m in self.modules.values() for path, site in m.sites().items()}


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a wrapper's parameters live: the module's device; float32 on half-precision and quantised bases."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    wide = dtype if dtype not in HALF and dtype.itemsize >= 4 else torch.float32
    return (tensors[0].device if tensors else torch.device("cpu")), wide


def build(model: nn.Module, config: MoloraConfig, sites: tuple[SiteConfig, ...], seed: int = 0) -> Built:
    """All wrappers of ``sites``, initialised from ``seed``; the model is not touched, the global RNG not advanced."""
    check(config)
    owner = Owner()
    modules: dict[str, Wrapper] = {}
    for site in sorted(sites, key=lambda s: s.role == "rows"):
        placement = config.placements[site.placement]
        if site.role != "parameter":
            modules[site.path] = _site(model.get_submodule(site.path), site, placement, config.kernel, owner, seed)
    modules |= _fused(model, [s for s in sites if s.role == "parameter"], config, owner, seed)
    for path in _saved_paths(model, config, sites):
        original = model.get_submodule(path)
        modules[path] = SavedModule(original, copy.deepcopy(original).requires_grad_(True), owner, path)
    return Built(config, sites, owner, modules, _head(model, config, sites, seed))


def _site(base: nn.Module, site: SiteConfig, p: Placement, kernel: str, owner: Owner, seed: int) -> Wrapper:
    device, dtype = _place(base)
    start = torch.device("meta") if device.type == "meta" else torch.device("cpu")
    router = None
    if site.lead and p.router.scope != "model":
        router = ROUTERS[p.router.kind](site.in_features, site.num_experts, p.router, p.gate, start)
        rates = [b.rate for b in p.balance if BALANCES[b.kind].steers]
        if rates and isinstance(router, BiasedRouter):
            router.add_select_bias(rates[0], start)
    if site.role == "rows":
        wrapper: MixtureLinear | FFNRows = FFNRows(base, site, p, owner, router)
    else:
        bank = _routed_bank(site, p, dtype, start, seed) if site.ranks else None
        always = {
            name: _bank(own, (True, True), dtype, start, Initialiser, generator(seed, site.path, "always", name))
            for name, own in site.always().items()
        }
        wrapper = ROLES[site.role](base, site, p, owner, router, bank, kernel, always)
    if router is not None and start.type != "meta":
        router.reset_parameters(generator(seed, site.path, "router"))
    for name, child in wrapper.named_children():
        if name != "base_layer":
            child.to(device)
    return wrapper.train(base.training)


def _routed_bank(site: SiteConfig, p: Placement, dtype: torch.dtype, device: torch.device, seed: int) -> Bank:
    return _bank(site, trains(p), dtype, device, start_of(p), generator(seed, site.path, "bank"))


def _bank(
    site: SiteConfig,
    learned: tuple[bool, bool],
    dtype: torch.dtype,
    device: torch.device,
    start: type[Initialiser],
    rng: torch.Generator,
) -> Bank:
    """A bank of the site's kind at its start; ``learned``: whether experts are trained, and B with them."""
    entry = bank_class(site)
    if faults := entry.faults(site):
        raise ConfigError("; ".join(faults))
    bank = entry(site, train=learned[0], train_B=learned[1], dtype=dtype, device=device)
    if device.type != "meta":
        draw(bank, start, rng)
    return bank


def _fused(
    model: nn.Module, sites: list[SiteConfig], config: MoloraConfig, owner: Owner, seed: int
) -> dict[str, FusedExperts]:
    """One wrapper for each block of the base's own experts, whatever number of its parameters is adapted."""
    parts: dict[str, dict[str, FusedParameter]] = {}
    for site in sites:
        path, name = owner_of(site.path)
        p, (device, dtype) = config.placements[site.placement], _place(model.get_submodule(path))
        start = torch.device("meta") if device.type == "meta" else torch.device("cpu")
        if not bank_class(site).for_stacked:
            raise ConfigError(f"{site.path}: got bank={site.kind!r} for experts of the base, expected another kind")
        bank = _routed_bank(site, p, dtype, start, seed)
        parts.setdefault(path, {})[name] = FusedParameter(site, p, owner, bank.to(device))
    bases = {path: model.get_submodule(path) for path in parts}
    return {path: FusedExperts(base, parts[path], owner, path).train(base.training) for path, base in bases.items()}


def _head(model: nn.Module, config: MoloraConfig, sites: tuple[SiteConfig, ...], seed: int) -> Router | None:
    wide = [p for p in config.placements if p.router.scope == "model"]
    if not wide:
        return None
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    hidden = getattr(text, "hidden_size", None)
    if not isinstance(hidden, int):
        raise TargetError(f"{type(model).__name__}: its config names no hidden_size, which a model-wide router needs")
    device = _place(model)[0]
    start = torch.device("meta") if device.type == "meta" else torch.device("cpu")
    experts = next(s.num_experts for s in sites if config.placements[s.placement].router.scope == "model")
    head = ROUTERS[wide[0].router.kind](hidden, experts, wide[0].router, wide[0].gate, len(sites), start)
    if start.type != "meta":
        head.reset_parameters(generator(seed, HEAD))
    return head.to(device).train(model.training)


def _saved_paths(model: nn.Module, config: MoloraConfig, sites: tuple[SiteConfig, ...]) -> list[str]:
    paths = [p for p, _ in model.named_modules() if p]
    out = []
    for name in config.modules_to_save:
        hits = [p for p in paths if p == name or p.endswith("." + name)]
        if not hits:
            ends = list(dict.fromkeys(p.rpartition(".")[2] for p in paths))
            raise TargetError(f"modules_to_save: no module is named {name!r}{nearest(name, ends)}")
        for hit in hits:
            adapted = [s.path for s in sites if s.path == hit or s.path.startswith(hit + ".")]
            if adapted:
                raise TargetError(
                    f"modules_to_save: {hit} is also adapted ({adapted[0]}); use exclude_modules on one side"
                )
        out += hits
    return list(dict.fromkeys(out))
