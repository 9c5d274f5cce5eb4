"""Module surgery: build every wrapper beside the model, then swap them in; all of it or nothing."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from molora.bank import ExpertBank
from molora.config import MoloraConfig, Placement
from molora.errors import ConfigError, TargetError, nearest
from molora.ffn import FFNDown, FFNRows, FFNUp
from molora.kernels.dispatch import known
from molora.layers import MixtureLinear, Owner, RoutedModule, SavedModule
from molora.routers import BALANCES, ROUTERS, BiasedRouter, HiddenRouter
from molora.site import SiteConfig
from molora.targets import check_calls, check_forward

__all__ = ["HEAD", "Built", "Mixture", "build", "check_tables", "install", "sites_of"]
__all__ += ["uninstall", "wrappers_of"]

HEAD = "molora_router"  # attribute of the model that holds a model-wide router
HALF = (torch.float16, torch.bfloat16)
ROLES: dict[str, type[MixtureLinear]] = {"linear": MixtureLinear, "up": FFNUp, "down": FFNDown}


@dataclass
class Mixture:
    """What a converted model remembers: its config and sites, and how it was before."""

    config: MoloraConfig
    sites: tuple[SiteConfig, ...]
    owner: Owner
    base_class: type[nn.Module]
    trainable: tuple[str, ...]
    fingerprint: dict[str, object] = field(default_factory=dict)


@dataclass
class Built:
    """Wrappers that stand ready beside an unchanged model, in the order they go in."""

    config: MoloraConfig
    sites: tuple[SiteConfig, ...]
    owner: Owner
    modules: dict[str, nn.Module]
    head: HiddenRouter | None

    def routed(self) -> dict[str, RoutedModule]:
        """The sites by path."""
        return {p: m for p, m in self.modules.items() if isinstance(m, RoutedModule)}


def check_tables(config: MoloraConfig) -> None:
    """ConfigError for a router, balance rule or kernel that is in no table."""
    known(config.kernel)
    for p in config.placements:
        tables: list[tuple[str, Mapping[str, object]]] = [(p.router.kind, ROUTERS)]
        for name, table in [*tables, *((b.kind, BALANCES) for b in p.balance)]:
            if name not in table:
                raise ConfigError(f"got {name!r}, expected one of {', '.join(table)}{nearest(name, table)}")


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names alone, not on order or the global random state."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _place(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a wrapper's parameters live: the module's device; float32 on half-precision and quantised bases."""
    tensors = [*module.parameters(), *module.buffers()]
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    wide = dtype if dtype not in HALF and dtype.itemsize >= 4 else torch.float32
    return (tensors[0].device if tensors else torch.device("cpu")), wide


def build(model: nn.Module, config: MoloraConfig, sites: tuple[SiteConfig, ...], seed: int = 0) -> Built:
    """All wrappers of ``sites``, initialised from ``seed``; the model is not touched, the global RNG not advanced."""
    check_tables(config)
    owner = Owner()
    modules: dict[str, nn.Module] = {}
    for site in sorted(sites, key=lambda s: s.role == "rows"):
        placement = config.placements[site.placement]
        modules[site.path] = _site(model.get_submodule(site.path), site, placement, config.kernel, owner, seed)
    for path in _saved_paths(model, config, sites):
        original = model.get_submodule(path)
        modules[path] = SavedModule(original, copy.deepcopy(original).requires_grad_(True), owner, path)
    return Built(config, sites, owner, modules, _head(model, config, sites, seed))


def _site(base: nn.Module, site: SiteConfig, p: Placement, kernel: str, owner: Owner, seed: int) -> RoutedModule:
    device, dtype = _place(base)
    start = torch.device("meta") if device.type == "meta" else torch.device("cpu")
    router = None
    if site.lead and p.router.scope != "model":
        router = ROUTERS[p.router.kind](site.in_features, site.num_experts, p.router, p.gate, start)  # type: ignore[arg-type]
        rates = [b.rate for b in p.balance if b.kind == "bias"]
        if rates and isinstance(router, BiasedRouter):
            router.add_select_bias(rates[0], start)
    if site.role == "rows":
        wrapper: RoutedModule = FFNRows(base, site, p, owner, router)
    else:
        bank = ExpertBank(site, train=p.train_experts, dtype=dtype, device=start) if site.ranks else None
        if bank is not None:
            bank.lora_B.requires_grad_(p.trains_B)
        wrapper = ROLES[site.role](base, site, p, owner, router, bank, kernel)
        if bank is not None and start.type != "meta":
            bank.reset_parameters(generator(seed, site.path, "bank"), p.init_lora_weights)
    if router is not None and start.type != "meta":
        router.reset_parameters(generator(seed, site.path, "router"))
    for name, child in wrapper.named_children():
        if name != "base_layer":
            child.to(device)
    return wrapper.train(base.training)


def _head(model: nn.Module, config: MoloraConfig, sites: tuple[SiteConfig, ...], seed: int) -> HiddenRouter | None:
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
    head = HiddenRouter(hidden, experts, wide[0].router, wide[0].gate, len(sites), start)
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


def _swap(model: nn.Module, path: str, new: nn.Module) -> None:
    setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], new)


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every path to each module, by id: a shared module is wrapped once and put in each place."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return places


def install(model: nn.Module, built: Built, again: bool = False) -> Mixture:
    """Swap the wrappers in and freeze the base. On any failure the model is put back as it was.

    TargetError for a wrapper that would not be called, and for a model whose ``forward`` was replaced on the instance,
    unless ``again``: it was a mixture's before.
    """
    if not again:
        check_forward(model)
    check_calls(model, built.modules)
    trainable = tuple(n for n, p in model.named_parameters() if p.requires_grad)
    frozen = [p for p in model.parameters() if p.requires_grad]
    places = _places(model)
    done: list[tuple[str, nn.Module]] = []
    try:
        for path, module in built.modules.items():
            original = model.get_submodule(path)
            for place in places[id(original)]:
                _swap(model, place, module)
                done.append((place, original))
        if built.head is not None:
            model.add_module(HEAD, built.head)
        keep = {id(p) for m in built.modules.values() for p in _own(m)}
        keep |= set() if built.head is None else {id(p) for p in built.head.parameters()}
        for p in frozen:
            if id(p) not in keep:
                p.requires_grad_(False)
    except BaseException:
        model._modules.pop(HEAD, None)
        for path, original in reversed(done):
            _swap(model, path, original)
        for p in frozen:
            p.requires_grad_(True)
        raise
    return Mixture(built.config, built.sites, built.owner, type(model), trainable)


def _own(wrapper: nn.Module) -> Iterator[nn.Parameter]:
    for name, child in wrapper.named_children():
        if name not in ("base_layer", "original"):
            yield from child.parameters()


def wrappers_of(model: nn.Module) -> dict[str, RoutedModule | SavedModule]:
    """Path of now to wrapper, of the mixture in force; a model may hold others that are parked."""
    mixture: Mixture | None = getattr(model, "_molora", None)
    return {
        now: m
        for now, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, RoutedModule | SavedModule) and (mixture is None or m.owner is mixture.owner)
    }


def sites_of(model: nn.Module) -> dict[str, tuple[str, RoutedModule]]:
    """Adapted modules: the path they have now to (the path they had in the base, the module), each module once."""
    sites: dict[RoutedModule, str] = {}
    for now, m in wrappers_of(model).items():
        if isinstance(m, RoutedModule):
            sites.setdefault(m, now)
    return {now: (m.site.path, m) for m, now in sites.items()}


def uninstall(model: nn.Module, mixture: Mixture, parking: bool = False) -> None:
    """Put the original modules back, with their ``requires_grad``; banks, routers and trained copies are dropped."""
    outer_first = sorted(wrappers_of(model).items(), key=lambda item: item[0].count("."))
    around = [p for p, m in outer_first if isinstance(m, FFNRows)]
    for path, module in outer_first:
        original = module.original if isinstance(module, SavedModule) else module.base_layer
        shortened = path
        for other in around:
            shortened = shortened.replace(other + ".base_layer.", other + ".")
        _swap(model, shortened, original)  # type: ignore[arg-type]
    if not parking:
        model._modules.pop(HEAD, None)
    names: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    for name in mixture.trainable:
        if name in names:  # not one that was tied to another, or taken away, since
            names[name].requires_grad_(True)
