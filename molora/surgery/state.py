"""The tensors that make up an adapter, under names that do not depend on how the model is wrapped; and merging one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from molora.config.strict import shown
from molora.errors import AdapterError, ConfigError, nearest
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import HEAD
from molora.layers.routed import RoutedModule
from molora.layers.saved import SavedModule
from molora.layers.stacked import FusedExperts, FusedParameter
from molora.layers.wrapper import Wrapper
from molora.surgery.install import sites_of, wrappers_of

__all__ = ["expert_modules", "keep_trained", "merge_expert", "merges", "saved_tensors", "stacks_of", "trained_copies"]

T = TypeVar("T")


def merges(m: RoutedModule) -> bool:
    """Whether a site computes the base's function of other weights, which do not depend on the token."""
    return isinstance(m, FusedParameter) or (isinstance(m, MixtureLinear) and m.always_on and m.site.num_experts == 1)


@torch.no_grad()
def merge_expert(model: nn.Module, m: RoutedModule) -> None:
    """Add what the site learned into its base weight: a linear's in float32, stacked experts' as their forward does.

    Raises:
        AdapterError: for a base that is no plain float linear, or an expert with NaN or infinite values.
    """
    if isinstance(m, FusedParameter):
        weight: Any = _holders(model)[m].get_parameter(m.site.path.rpartition(".")[2])
        merged = m(weight)
    else:
        assert isinstance(m, MixtureLinear)
        weight, bank = m.base_layer._parameters.get("weight"), m.bank
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or bank is None:
            raise AdapterError(
                f"{m.site.path}: cannot merge into a {type(m.base_layer).__name__}; only plain float linears"
            )
        A, B, scale = bank.expert(0)
        delta_OI = scale * (B.float() @ A.float())
        transposed = weight.shape != delta_OI.shape or hasattr(m.base_layer, "nx")
        merged = weight + (delta_OI.t() if transposed else delta_OI).to(weight.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise AdapterError(f"{m.site.path}: the expert holds NaN or infinite values; nothing was merged here")
    weight.copy_(merged)


def _holders(model: nn.Module) -> dict[FusedParameter, nn.Module]:
    """The block of each site on a stacked parameter."""
    blocks = [w for w in wrappers_of(model).values() if isinstance(w, FusedExperts)]
    return {part: w.base_layer for w in blocks for part in w.parts().values()}


def stacks_of(model: nn.Module) -> dict[str, tuple[Tensor, Tensor, float, int]]:
    """The LoRAs of the base's own experts by path of the parameter: A (E r, in), B (out, E r), scale and E."""
    sites = [(path, m) for path, m in sites_of(model).values() if isinstance(m, FusedParameter)]
    return {p: (m.bank.lora_A, m.bank.lora_B, m.site.scales[0], m.site.num_experts) for p, m in sites}


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
    """A, B and scale of one expert, by index or by its name among ``names``, at every site that has it.

    Sites with a single expert come along where others have several.

    Raises:
        ConfigError: when there is no such expert.
    """
    sites = [m for _, m in sites_of(model).values() if isinstance(m, MixtureLinear) and m.bank is not None]
    largest = max((m.site.num_experts for m in sites), default=1)
    if isinstance(expert, str) and expert not in names:
        raise ConfigError(
            f"export_expert: got {expert!r}, expected one of {names or 'the indices'}{nearest(expert, names)}"
        )
    index = names.index(expert) if isinstance(expert, str) else expert
    if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < largest:
        raise ConfigError(f"export_expert: got {shown(index)}, expected an index from 0 to {largest - 1}")
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
