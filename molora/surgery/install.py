"""Module surgery: wrappers that stand ready are swapped in, and out again; all of it or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from molora.errors import TargetError
from molora.layers.mixture import HEAD, Mixture
from molora.layers.routed import RoutedModule
from molora.layers.wrapper import Wrapper
from molora.surgery.build import Built

__all__ = ["check_forward", "install", "sites_of", "uninstall", "wrappers_of"]


def _swap(model: nn.Module, path: str, new: nn.Module) -> None:
    setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], new)


def _places(model: nn.Module) -> dict[int, list[str]]:
    """Every path to each module, by id: a shared module is wrapped once and put in each place."""
    places: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(id(module), []).append(path)
    return places


def check_forward(model: nn.Module) -> None:
    """TargetError for a model whose ``forward`` was replaced on the instance: ours would never run."""
    if "forward" in vars(model):
        raise TargetError(
            f"forward is replaced on this {type(model).__name__} (a device map with hooks, or a patch), so what the "
            "mixture does around it would be skipped; convert or load first, then dispatch or patch"
        )


def check_calls(model: nn.Module, paths: Iterable[str]) -> None:
    """TargetError for linears whose weights PyTorch's own encoder layer reads in eval mode, past their experts."""
    fast = [p for p in paths if isinstance(model.get_submodule(p.rpartition(".")[0]), nn.TransformerEncoderLayer)]
    if fast and torch.backends.mha.get_fastpath_enabled():
        raise TargetError(
            f"{fast[0]}: nn.TransformerEncoderLayer reads this weight in eval mode and never calls the linear, so that "
            "experts on it would do nothing; call torch.backends.mha.set_fastpath_enabled(False) first, here and "
            "wherever the adapter is used"
        )


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
        keep = {id(p) for m in built.modules.values() for p in m.own_parameters()}
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
    penalised = tuple(m for m in built.routed().values() if m.placement.penalties and getattr(m, "bank", None))
    return Mixture(built.config, built.sites, built.owner, type(model), trainable, penalised=penalised)


def wrappers_of(model: nn.Module) -> dict[str, Wrapper]:
    """Path of now to wrapper, of the mixture in force; a model may hold others that are not."""
    return {now: m for now, m in _own_modules(model) if isinstance(m, Wrapper)}


def _own_modules(model: nn.Module) -> Iterator[tuple[str, RoutedModule | Wrapper]]:
    mixture: Mixture | None = getattr(model, "_molora", None)
    for now, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, RoutedModule | Wrapper) and (mixture is None or m.owner is mixture.owner):
            yield now, m


def sites_of(model: nn.Module) -> dict[str, tuple[str, RoutedModule]]:
    """Adapted modules: the path they have now to (the path they had in the base, the module), each module once."""
    sites: dict[RoutedModule, str] = {}
    for now, m in _own_modules(model):
        if isinstance(m, RoutedModule):
            sites.setdefault(m, now)
    return {now: (m.site.path, m) for m, now in sites.items()}


def uninstall(model: nn.Module, mixture: Mixture, keep_head: bool = False) -> None:
    """Put the original modules back, with their ``requires_grad``; banks, routers and trained copies are dropped."""
    outer_first = sorted(wrappers_of(model).items(), key=lambda item: item[0].count("."))
    around = {f"{path}.{m.inner}.": f"{path}." for path, m in outer_first if m.around}
    for path, module in outer_first:
        original, shortened = module.wrapped, path
        assert original is not None, "a mixture in force wraps modules"
        for inside, before in around.items():
            shortened = shortened.replace(inside, before)
        _swap(model, shortened, original)
    if not keep_head:
        model._modules.pop(HEAD, None)
    names: Mapping[str, nn.Parameter] = dict(model.named_parameters())
    for name in mixture.trainable:
        if name in names:  # not one that was tied to another, or taken away, since
            names[name].requires_grad_(True)
