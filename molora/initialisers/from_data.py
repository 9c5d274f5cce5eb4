"""What the starts from data share: the sites they start, and a copy of the model for PEFT to look at."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sized
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import ConfigError
from molora.initialisers.from_weight import deal_out
from molora.layers.banks.plain import ExpertBank
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import mixture_of
from molora.layers.stacked import FusedParameter

__all__ = ["Batches", "bank_of", "check_weights", "fresh_sites", "on_device", "shared_copy", "take"]


class Batches(Sized, Protocol):
    """Batches of the model's keyword arguments, which can be gone through again and again: a DataLoader or a list."""

    def __iter__(self) -> Iterator[Any]: ...


def bank_of(m: MixtureLinear) -> ExpertBank:
    """The bank of a site that :func:`fresh_sites` found."""
    return cast(ExpertBank, m.bank)


def fresh_sites(model: nn.Module, what: str) -> dict[str, MixtureLinear]:
    """The sites with trainable experts, by path, whose B has to be zero still.

    Raises:
        ConfigError: in the name of ``what``, for a model without such experts, with trained ones, or with linears that
            PEFT does not know.
    """
    if mixture_of(model) is None:
        raise ConfigError(f"{what}: got a plain model, expected a converted one; call molora.convert first")
    out = {}
    for path, m in model.named_modules():
        if isinstance(m, FusedParameter):
            raise ConfigError(
                f"{what}: {m.site.path} is no linear with an input that PEFT could look at; expected a mixture without "
                "target_parameters"
            )
        bank = m.bank if isinstance(m, MixtureLinear) else None
        if bank is not None and "lora_A" not in bank.dims:
            raise ConfigError(f"{what}: {path} has a {type(bank).__name__}, expected experts of A and B, bank='plain'")
        if bank is None or not sum(bank.ranks) or not bank_of(cast(MixtureLinear, m)).lora_A.requires_grad:
            continue
        if not isinstance(m.base_layer, nn.Linear | Conv1D):
            raise ConfigError(f"{what}: {path} is a {type(m.base_layer).__name__}, expected a linear that PEFT knows")
        if bool(bank_of(cast(MixtureLinear, m)).lora_B.any()):
            raise ConfigError(
                f"{what}: {path} has experts whose B is not zero: trained, or of another start; expected a model "
                "fresh from convert with init_lora_weights=True"
            )
        out[path] = m
    if not out:
        raise ConfigError(f"{what}: got a model without trainable experts, expected some to start")
    return out


def check_weights(sites: dict[str, MixtureLinear], ranks: dict[str, int], what: str, directions: int = 1) -> None:
    """See that each weight can be decomposed to so many ranks by path, each of which takes so many ``directions``.

    Raises:
        ConfigError: where a linear has fewer, for experts of unequal ranks or scales, and for a weight that is
            quantised or sharded.
    """
    for path, m in sites.items():
        weight: Any = m.base_layer.weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or not weight.numel():
            raise ConfigError(f"{what}: the weight of {path} is quantised or sharded, expected a whole float weight")
        if len({*zip(bank_of(m).ranks, bank_of(m).scales, strict=True)}) > 1:
            raise ConfigError(f"{what}: {path} has experts of unequal ranks or scales, expected one of each")
        narrow = min(m.in_features, m.out_features)
        if narrow < ranks[path] * directions:
            raise ConfigError(
                f"{what}: got experts of {ranks[path]} ranks in all, expected at most {narrow // directions}: {path} "
                f"is {m.in_features} to {m.out_features}"
            )


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy on the same storage, whose modules, flags, gradients and hooks are its own."""
    tensors: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p
        for p in model.parameters()
    }
    return copy.deepcopy(model, tensors)


def on_device(batch: Any, model: nn.Module) -> dict[str, Any]:
    """A batch with its tensors where the model is."""
    device = next(model.parameters()).device
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def take(model: nn.Module, starts: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Deal the ranks A (R, I) and B (O, R) of each site out to its experts, and have them taken back."""
    mixture, taken = mixture_of(model), {}
    assert mixture is not None, "fresh_sites has seen to it"
    with torch.no_grad():
        for path, m in dict(model.named_modules()).items():
            if path in starts:
                deal_out(m, *starts[path])
                taken[m.site.path] = m.site
    mixture.sites = tuple(taken.get(s.path, s) for s in mixture.sites)
