"""The wrappers of an adapter that was read: checked against the model, built beside it, filled with the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from molora.adapter.folder import Described, check_fingerprint
from molora.config.site import SiteConfig
from molora.errors import AdapterError, ConfigError, TargetError
from molora.layers.mixture import HEAD
from molora.layers.routed import RoutedModule
from molora.layers.wrapper import Wrapper
from molora.surgery.build import Built, build
from molora.surgery.target_parameters import stacked_at
from molora.surgery.trace import linear_shape

__all__ = ["fill", "led", "wrappers_for"]


def wrappers_for(adapter: Described, base_model: nn.Module, *, ignore_base: bool = False) -> Built:
    """The wrappers of ``adapter``, with random weights, beside the model that they were made for.

    Raises:
        AdapterError: for another base, or one without linears of those widths at the recorded places.
    """
    check_fingerprint(adapter, base_model, ignore=ignore_base)
    _check_sites(adapter, base_model)
    try:
        return build(base_model, adapter.config, adapter.sites)
    except (ConfigError, TargetError) as e:
        raise AdapterError(f"{adapter.folder}: its config does not fit this model: {e}") from e


def _check_sites(adapter: Described, model: nn.Module) -> None:
    """Every site must be a linear of the recorded widths in this model, whatever the fingerprint says."""
    modules = dict(model.named_modules())
    for site in adapter.sites:
        if site.role == "parameter":
            _check_stacked(adapter, model, site)
            continue
        module = modules.get(site.path)
        if module is None:
            raise AdapterError(f"{adapter.folder}: adapts {site.path}, which this {type(model).__name__} does not have")
        shape = linear_shape(module)
        if site.role != "rows" and shape != (site.in_features, site.out_features):
            raise AdapterError(
                f"{adapter.folder}: {site.path}: made for {site.in_features} to {site.out_features}, this model has "
                f"{'no linear there' if shape is None else f'{shape[0]} to {shape[1]}'}"
            )


def _check_stacked(adapter: Described, model: nn.Module, site: SiteConfig) -> None:
    """The same for a parameter with experts of the base; how it is stored decides what A and B mean."""
    try:
        found = stacked_at(model, site.path)
    except TargetError as e:
        raise AdapterError(f"{adapter.folder}: does not fit this model: {e}") from e
    if (found.experts, *found.shape, found.transposed) != (
        site.num_experts,
        site.in_features,
        site.out_features,
        site.transposed,
    ):
        raise AdapterError(
            f"{adapter.folder}: {site.path}: made for a parameter of shape {site.stacked()}, this model has "
            f"{tuple(model.get_parameter(site.path).shape)}"
            + (", stored the other way round" if found.transposed != site.transposed else "")
        )


def fill(built: Built, tensors: dict[str, Tensor], folder: str) -> None:
    """Copy tensors by canonical name into wrappers that are not installed yet; every one must find its place.

    Raises:
        AdapterError: for a missing, extra or misshapen tensor.
    """
    targets: dict[str, Tensor] = {}
    keepers: dict[str, Wrapper | RoutedModule] = {path: m for path, m in built.modules.items() if not m.sites()}
    for path, module in {**keepers, **built.routed()}.items():
        for part in module.saved:
            child = getattr(module, part, None)
            if child is not None:
                targets.update({f"{path}.{part}.{n}": t for n, t in child.state_dict(keep_vars=True).items()})
    if built.head is not None:
        targets.update({f"{HEAD}.{n}": t for n, t in built.head.state_dict(keep_vars=True).items()})
    missing, extra = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    if missing or extra:
        raise AdapterError(
            f"{folder}: missing tensors {missing[:5]} and unknown tensors {extra[:5]}; the file is not whole"
        )
    for name, target in targets.items():
        t = tensors[name]
        if target.shape != t.shape:
            raise AdapterError(f"{folder}: {name}: got shape {tuple(t.shape)}, expected {tuple(target.shape)}")
        if t.dtype.itemsize > target.dtype.itemsize and not bool(t.to(target.dtype).isfinite().all()):
            raise AdapterError(f"{folder}: {name}: holds {t.dtype} values too large for {target.dtype}; it is damaged")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def led(tensors: Mapping[str, Tensor], sites: Sequence[SiteConfig]) -> dict[str, Tensor]:
    """A block's router may be named after any linear of the block; it belongs to the one that leads."""
    lead = {s.block: s.path for s in sites if s.block and s.lead}
    leads = {s.path: lead[s.block] for s in sites if s.block in lead}
    out = {}
    for name, t in tensors.items():
        path, found, rest = name.partition(".router.")
        out[f"{leads.get(path, path)}{found}{rest}"] = t
    return out
