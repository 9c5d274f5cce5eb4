"""Adapter folder to converted model: read and checked whole, then installed whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from molora import processes
from molora.adapter_state import saved_tensors
from molora.build import HEAD, Built, build
from molora.checkpoint import Described, check_fingerprint, load_tensors, read_adapter
from molora.convert import on_cpu
from molora.errors import AdapterError, ConfigError, TargetError
from molora.install import install
from molora.interop.foreign import Asked, Importer, packed
from molora.layers import SavedModule
from molora.model import MixtureModel, adopt
from molora.resolve import resolve
from molora.site import SiteConfig
from molora.target_parameters import stacked_at
from molora.trace import linear_shape

__all__ = ["from_pretrained", "load", "restore", "wrappers_for"]

M = TypeVar("M", bound=nn.Module)


@on_cpu()
def load(
    base_model: M,
    folder: str | os.PathLike[str],
    *,
    trainable: bool = False,
    allow_pickle: bool = False,
    ignore_base: bool = False,
    **missing: Any,
) -> M:
    """Put the adapter in ``folder`` on ``base_model``, in place; returns the same object.

    Args:
        base_model: the model the adapter was made for; a bare class of the same shapes with ``ignore_base=True``.
        folder: an adapter folder of molora, or of one of the formats in ``molora.interop.importers.IMPORTERS``.
        trainable: leave the experts and routers trainable, as they were when trained.
        allow_pickle: for foreign ``.bin`` files only; molora's own folders never hold one.
        ignore_base: skip the comparison of the base's fingerprint, never that of shapes. Foreign folders have none.
        missing: what a foreign folder does not record, such as ``top_k`` or ``adapters``; the error without it says
            what it means. A molora folder records everything.

    Raises:
        AdapterError, ConfigError: for a folder that is not whole or not for this base, and for what is missing or not
            known; the model is then as before.
    """
    if isinstance(base_model, MixtureModel):
        raise ConfigError("load: this model already carries a mixture; call model.unload() first")
    from molora.interop.importers import importer_of  # six readers, which `import molora` can do without

    importer = importer_of(folder)
    if importer is not None:
        return _foreign(base_model, importer, Asked(Path(folder), allow_pickle, missing), trainable)
    adapter = read_adapter(folder)
    if missing:
        raise ConfigError(f"load: got {sorted(missing)}, but a molora folder records everything; leave them out")
    built = wrappers_for(adapter, base_model, ignore_base=ignore_base)
    fill(built, load_tensors(adapter), os.fspath(folder))
    adopt(base_model, install(base_model, built))
    if not trainable:
        base_model.requires_grad_(False)
    return base_model


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


def _foreign(model: M, importer: Importer, asked: Asked, trainable: bool) -> M:
    """Read and check everything, then build beside the model, then install."""
    foreign = importer.read(asked.folder, model, asked)
    asked.finish()
    try:
        sites = resolve(model, foreign.config, foreign.adapters)
        built = build(model, foreign.config, sites)
    except (ConfigError, TargetError) as e:
        raise AdapterError(f"{asked.folder}: does not fit this model: {e}") from e
    fill(built, _led({**packed(foreign.adapters), **foreign.tensors}, sites), os.fspath(asked.folder))
    adopt(model, install(model, built))
    if not trainable:
        model.requires_grad_(False)
    return model


def _led(tensors: Mapping[str, Tensor], sites: Sequence[SiteConfig]) -> dict[str, Tensor]:
    """A block's router may be named after any linear of the block; it belongs to the one that leads."""
    lead = {s.block: s.path for s in sites if s.block and s.lead}
    leads = {s.path: lead[s.block] for s in sites if s.block in lead}
    out = {}
    for name, t in tensors.items():
        path, found, rest = name.partition(".router.")
        out[f"{leads.get(path, path)}{found}{rest}"] = t
    return out


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
    saved = {path: m for path, m in built.modules.items() if isinstance(m, SavedModule)}
    for path, module in {**saved, **built.routed()}.items():
        for part in ("trained",) if isinstance(module, SavedModule) else ("bank", "router"):
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


def restore(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Copy the adapter in ``folder`` into a model that carries the same mixture already, as resuming does.

    Parameters that ZeRO-3 partitioned are gathered for it, so every process has to call it then.

    Raises:
        AdapterError: for a folder that is not whole, or holds another mixture; the model is then as before.
    """
    mixture = getattr(model, "_molora", None)
    if mixture is None:
        raise ConfigError(
            "restore: got a plain model, expected one that carries a mixture; use molora.load(base, folder)"
        )
    adapter = read_adapter(folder)
    own, other = mixture.config.without_folders().to_dict(), adapter.config.to_dict()
    differing = sorted(k for k in own if own[k] != other.get(k)) + (["sites"] if adapter.sites != mixture.sites else [])
    if differing:
        raise AdapterError(f"{folder}: holds another mixture than the model; they differ in {', '.join(differing)}")
    tensors = load_tensors(adapter)
    targets = saved_tensors(model, model.state_dict(keep_vars=True))
    with torch.no_grad():
        for name, target in targets.items():
            with processes.whole(target, write=True):
                target.copy_(tensors[name])


def from_pretrained(folder: str | os.PathLike[str], *, trainable: bool = False, **kwargs: Any) -> nn.Module:
    """Load the base model named in the adapter folder with transformers, then the adapter onto it.

    ``kwargs`` go to ``AutoModelForCausalLM.from_pretrained`` (or the auto class that knows the base's class).

    Raises:
        AdapterError: when the folder names no base model.
    """
    import transformers

    adapter = read_adapter(folder)
    name = adapter.fingerprint.get("base_model_name_or_path")
    class_name = str(adapter.fingerprint.get("class", ""))
    if not name:
        raise AdapterError(f"{folder}: names no base model; load the base yourself and call molora.load(base, folder)")
    cls = getattr(transformers, class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise TargetError(
            f"{folder}: its base class {class_name!r} is not one of transformers; use molora.load(base, folder)"
        )
    return load(cls.from_pretrained(name, **kwargs), folder, trainable=trainable)
