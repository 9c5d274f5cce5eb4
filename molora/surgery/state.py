"""The tensors that make up an adapter, under names that do not depend on how the model is wrapped; and merging one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from molora.config.strict import shown
from molora.errors import AdapterError, ConfigError, nearest
from molora.layers.banks import banks_of
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import HEAD, Mixture
from molora.layers.routed import RoutedModule
from molora.layers.saved import SavedModule
from molora.layers.stacked import FusedParameter
from molora.layers.wrapper import Wrapper
from molora.surgery.install import sites_of, wrappers_of

__all__ = ["always_on_names", "expert_modules", "keep_trained", "merge_always_on", "merge_expert"]
__all__ += ["saved_tensors", "stacks_of", "trained_copies"]

T = TypeVar("T")


@torch.no_grad()
def merge_expert(model: nn.Module, m: RoutedModule) -> None:
    """Add what the site learned into its base weight: a linear's in float32, stacked experts' as their forward does.

    Raises:
        AdapterError: for a base that is no plain float linear, or an expert with NaN or infinite values.
    """
    weight = next(w.weight_of(m) for w in wrappers_of(model).values() if m in w.sites().values())
    merged = m.merged(weight)
    _check_merged(m, merged)
    weight.copy_(merged)


def _check_merged(m: RoutedModule, merged: Tensor) -> None:
    if not bool(torch.isfinite(merged).all()):
        raise AdapterError(f"{m.site.path}: the expert holds NaN or infinite values; nothing was merged here")


@torch.no_grad()
def merge_always_on(model: nn.Module, mixture: Mixture, name: str) -> None:
    """Add the always-on bank ``name`` into the base weight of every linear that has it, and take it off; all or none.

    Raises:
        ConfigError: when no linear has a bank of that name.
        AdapterError: for a base that is no plain float linear, or values that are NaN or infinite.
    """
    sites = [m for _, m in sites_of(model).values() if f"always.{name}" in banks_of(m)]
    if not sites:
        known = always_on_names(model)
        raise ConfigError(
            f"merge_always_on: got {shown(name)}, expected one of {list(known) or 'none: no bank is always on'}"
            f"{nearest(str(name), known)}"
        )
    linears = [m for m in sites if isinstance(m, MixtureLinear)]
    for linear in linears:  # all that can go wrong goes wrong here
        _check_merged(linear, _with_always(linear, name))
    for linear in linears:
        linear.weight_of(linear).copy_(_with_always(linear, name))
        linear.drop_always(name)
    own = {m.site.path: m.site for m in sites}
    mixture.sites = tuple(own.get(s.path, s) for s in mixture.sites)
    placements = mixture.config.placements
    left = tuple(p.replace(always=tuple(a for a in p.always if a.name != name)) for p in placements)
    mixture.config = mixture.config.replace(placements=left)
    for _, m in sites_of(model).values():
        m.placement = left[m.site.placement]


def _with_always(m: MixtureLinear, name: str) -> Tensor:
    return m.with_banks(m.weight_of(m), [banks_of(m)[f"always.{name}"]])


def always_on_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the banks that are always on, of all sites."""
    return tuple(dict.fromkeys(b.name for _, m in sites_of(model).values() for b in m.site.banks))


def stacks_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float, int]]:
    """The LoRAs of the base's own experts by path of the parameter: A (E r, in), B (out, E r), scale and E."""
    sites = [(path, m) for path, m in sites_of(model).values() if isinstance(m, FusedParameter)]
    return {p: (*m.bank.packed()[:2], m.site.scales[0], m.site.num_experts) for p, m in sites}


def trained_copies(model: nn.Module) -> dict[str, SavedModule]:
    """The modules of ``modules_to_save`` by their path in the base, each once."""
    return {m.path: m for m in wrappers_of(model).values() if isinstance(m, SavedModule)}


def keep_trained(model: nn.Module) -> None:
    """Make the trained copies of ``modules_to_save`` what is left when the wrappers come off, frozen like the base."""
    for m in trained_copies(model).values():
        m.original = m.trained.requires_grad_(False)


def expert_modules(
    model: nn.Module, names: Sequence[str], expert: str | int
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and scale of one expert, by index or by its name, at every site that has it.

    ``names``: of the routed experts; those of always-on banks are the config's. Where an index is asked for, sites
    with a single expert come along where others have several, and always-on banks, which have names, do not.

    Raises:
        ConfigError: when there is no such expert.
    """
    always = always_on_names(model)
    if isinstance(expert, str) and expert in always:
        found = {m.site.path: banks_of(m).get(f"always.{expert}") for _, m in sites_of(model).values()}
        return {path: bank.as_lora(0) for path, bank in found.items() if bank is not None}
    sites = [m for _, m in sites_of(model).values() if isinstance(m, MixtureLinear) and m.bank is not None]
    largest = max((m.site.num_experts for m in sites), default=1)
    if isinstance(expert, str) and expert not in names:
        raise ConfigError(
            f"export_expert: got {expert!r}, expected one of {[*names, *always] or 'the indices'}"
            f"{nearest(expert, [*names, *always])}"
        )
    index = names.index(expert) if isinstance(expert, str) else expert
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < largest:
        raise ConfigError(f"export_expert: got {shown(index)}, expected an index from 0 to {largest - 1}")
    modules = {}
    for m in sites:
        e = index if m.site.num_experts > 1 or largest == 1 else 0
        if e < m.site.num_experts and m.bank is not None and m.bank.ranks[e] > 0:
            modules[m.site.path] = m.bank.as_lora(e)
    return modules


def saved_tensors(model: nn.Module, state_dict: Mapping[str, T] | None = None) -> dict[str, T]:
    """What an adapter folder holds, by canonical name: banks, routers with their biases, the head, trained copies.

    ``state_dict``: what to take by the names of ``model.state_dict()``; the model's own without it.
    """
    state: Mapping[str, Any] = _own_state(model) if state_dict is None else state_dict
    out: dict[str, T] = {}
    places: list[tuple[str, str, tuple[str, ...]]] = [(now, p, m.saved) for now, (p, m) in sites_of(model).items()]
    places += [(now, m.place, m.saved) for now, m in wrappers_of(model).items() if not m.sites()]
    wanted = [(f"{now}.{part}.", f"{path}.{part}.") for now, path, saved in places for part in saved]
    wanted.append((f"{HEAD}.", f"{HEAD}."))
    prefixes = dict(wanted)
    for key, tensor in state.items():
        for now in _prefixes(key):
            if now in prefixes:
                out[prefixes[now] + key[len(now) :]] = tensor
                break
    return out


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """The part of ``model.state_dict()`` that is not the base's: to ask a quantised or offloaded base would read it."""
    state: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        for part in module.saved if isinstance(module, RoutedModule | Wrapper) else ():
            child = getattr(module, part, None)
            if isinstance(child, nn.Module):
                state |= child.state_dict(prefix=f"{path}.{part}.")
    head = getattr(model, HEAD, None)
    return state if head is None else state | head.state_dict(prefix=f"{HEAD}.")


def _prefixes(key: str) -> Iterator[str]:
    """Every leading part of a dotted key that ends in a dot, longest first."""
    end = key.rfind(".")
    while end > 0:
        yield key[: end + 1]
        end = key.rfind(".", 0, end)
