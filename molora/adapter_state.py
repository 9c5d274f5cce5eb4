"""The tensors that make up an adapter, under names that do not depend on how the model is wrapped; and merging one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from molora.errors import AdapterError, ConfigError, nearest
from molora.install import HEAD, sites_of, wrappers_of
from molora.layers import MixtureLinear, RoutedModule, SavedModule

__all__ = ["expert_modules", "merge_expert", "saved_tensors"]

PARTS = ("bank", "router", "trained")  # children of a wrapper that are saved
T = TypeVar("T")


def merge_expert(m: MixtureLinear) -> None:
    """Add the site's only expert into its base weight, in float32.

    Raises:
        AdapterError: for a base that is no plain float linear, or an expert with NaN or infinite values.
    """
    weight, bank = m.base_layer._parameters.get("weight"), m.bank
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or bank is None:
        raise AdapterError(
            f"{m.site.path}: cannot merge into a {type(m.base_layer).__name__}; only plain float linears"
        )
    A, B, scale = bank.expert(0)
    delta_OI = scale * (B.float() @ A.float())
    if not bool(torch.isfinite(delta_OI).all()):
        raise AdapterError(f"{m.site.path}: the expert holds NaN or infinite values; nothing was merged here")
    transposed = weight.shape != delta_OI.shape or hasattr(m.base_layer, "nx")
    with torch.no_grad():
        weight.add_((delta_OI.t() if transposed else delta_OI).to(weight.dtype))


def expert_modules(
    model: nn.Module, names: Sequence[str], expert: str | int
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """A, B and scale of one expert, by index or by its name among ``names``, at every site that has it.

    Sites with a single expert come along where others have several.

    Raises:
        ConfigError: when there is no such expert.
    """
    sites = [m for _, m in sites_of(model).values() if isinstance(m, MixtureLinear) and m.bank is not None]
    largest = max(m.site.num_experts for m in sites)
    if isinstance(expert, str) and expert not in names:
        raise ConfigError(
            f"export_expert: got {expert!r}, expected one of {names or 'the indices'}{nearest(expert, names)}"
        )
    index = names.index(expert) if isinstance(expert, str) else expert
    if not 0 <= index < largest:
        raise ConfigError(f"export_expert: got {index}, expected an index from 0 to {largest - 1}")
    modules = {}
    for m in sites:
        e = index if m.site.num_experts > 1 or largest == 1 else 0
        if e < m.site.num_experts and m.bank is not None and m.bank.ranks[e] > 0:
            modules[m.site.path] = m.bank.expert(e)
    return modules


def saved_tensors(model: nn.Module, state_dict: Mapping[str, T] | None = None) -> dict[str, T]:
    """What an adapter folder holds, by canonical name: banks, routers with their biases, the head, trained copies.

    ``state_dict``: what to take by the names of ``model.state_dict()``; the model's own without it.
    """
    state: Mapping[str, Any] = _own_state(model) if state_dict is None else state_dict
    out: dict[str, T] = {}
    places = [(now, path) for now, (path, _) in sites_of(model).items()]
    places += [(now, m.path) for now, m in wrappers_of(model).items() if isinstance(m, SavedModule)]
    wanted = [(f"{now}.{part}.", f"{path}.{part}.") for now, path in places for part in PARTS]
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
        for part in PARTS if isinstance(module, RoutedModule | SavedModule) else ():
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
