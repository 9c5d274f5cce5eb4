"""Adapter folder to converted model: read and checked whole, then installed whole."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from molora import processes
from molora.adapter.folder import load_tensors, read_adapter
from molora.adapter.hub import local_folder
from molora.errors import AdapterError, ConfigError, TargetError
from molora.interop.foreign import ASKED, Asked, Importer, named_base, packed
from molora.model import MixtureModel, adopt
from molora.surgery.build import build
from molora.surgery.fill import fill, led, wrappers_for
from molora.surgery.install import install
from molora.surgery.ready_made import on_cpu
from molora.surgery.resolve import resolve
from molora.surgery.state import saved_tensors

__all__ = ["from_pretrained", "load", "restore"]

M = TypeVar("M", bound=nn.Module)


@on_cpu()
def load(
    base_model: M,
    folder: str | os.PathLike[str],
    *,
    trainable: bool = False,
    allow_pickle: bool = False,
    ignore_base: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **missing: Any,
) -> M:
    """Put the adapter in ``folder`` on ``base_model``, in place; returns the same object.

    Args:
        base_model: the model the adapter was made for; a bare class of the same shapes with ``ignore_base=True``.
        folder: an adapter folder of molora, or of one of the formats in ``molora.interop.importers.IMPORTERS``; or
            ``"user/name"`` on the Hugging Face Hub, where no folder of that name is here.
        trainable: leave the experts and routers trainable, as they were when trained.
        allow_pickle: for foreign ``.bin`` files only; molora's own folders never hold one.
        ignore_base: skip the comparison of the base's fingerprint, never that of shapes. Foreign folders have none.
        revision, token, cache_dir: of a repository on the Hub, as for transformers' ``from_pretrained``.
        missing: what a foreign folder does not record, such as ``top_k`` or ``adapters``; the error without it says
            what it means. A molora folder records everything.

    Raises:
        AdapterError, ConfigError: for a folder that is not whole or not for this base, and for what is missing or not
            known; the model is then as before.
    """
    if isinstance(base_model, MixtureModel):
        raise ConfigError("load: this model already carries a mixture; call model.unload() first")
    from molora.interop.importers import hub_files, importer_of  # readers that `import molora` can do without

    folder = local_folder(folder, hub_files(allow_pickle), revision=revision, token=token, cache_dir=cache_dir)
    importer = importer_of(folder)
    if importer is not None:
        return _foreign(base_model, importer, Asked(folder, allow_pickle, missing), trainable)
    adapter = read_adapter(folder)
    _refuse_missing(missing)
    built = wrappers_for(adapter, base_model, ignore_base=ignore_base)
    fill(built, load_tensors(adapter), os.fspath(folder))
    adopt(base_model, install(base_model, built))
    if not trainable:
        base_model.requires_grad_(False)
    return base_model


def _foreign(model: M, importer: Importer, asked: Asked, trainable: bool) -> M:
    """Read and check everything, then build beside the model, then install."""
    foreign = importer.read(asked.folder, model, asked)
    asked.finish()
    try:
        sites = resolve(model, foreign.config, foreign.adapters)
        built = build(model, foreign.config, sites)
    except (ConfigError, TargetError) as e:
        raise AdapterError(f"{asked.folder}: does not fit this model: {e}") from e
    fill(built, led({**packed(foreign.adapters), **foreign.tensors}, sites), os.fspath(asked.folder))
    adopt(model, install(model, built))
    if not trainable:
        model.requires_grad_(False)
    return model


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


def from_pretrained(
    folder: str | os.PathLike[str],
    *,
    trainable: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load the base model that an adapter names, with transformers, then the adapter onto it.

    ``folder``, ``trainable``, ``allow_pickle`` and ``revision`` as in :func:`load`; ``token`` and ``cache_dir`` are
    used for adapter and base. Of ``kwargs``, what a foreign format does not record (``top_k``, ``adapters``, ...: the
    names in ``molora.interop.foreign.ASKED``) goes to :func:`load`, all the rest (``dtype``, ``device_map``, ...) to
    ``from_pretrained`` of the base's class.

    Raises:
        AdapterError: when the folder names no base model, or not its class.
        ConfigError, TargetError: as :func:`load`; for a class that transformers does not have.
    """
    from molora.interop.importers import hub_files, importer_of

    place = local_folder(folder, hub_files(allow_pickle), revision=revision, token=token, cache_dir=cache_dir)
    missing = {k: kwargs.pop(k) for k in ASKED if k in kwargs}
    if importer_of(place) is None:
        adapter = read_adapter(place)
        _refuse_missing(missing)
        name, class_name = adapter.fingerprint.get("base_model_name_or_path"), str(adapter.fingerprint.get("class"))
    else:
        name, class_name = named_base(place)
    if not name:
        raise AdapterError(f"{place}: names no base model; load the base yourself and call molora.load(base, folder)")
    shared = {k: v for k, v in (("token", token), ("cache_dir", cache_dir)) if v is not None}
    base: nn.Module = _base_class(place, class_name).from_pretrained(name, **shared, **kwargs)
    return load(base, place, trainable=trainable, allow_pickle=allow_pickle, **missing)


def _refuse_missing(missing: Mapping[str, Any]) -> None:
    if missing:
        raise ConfigError(f"load: got {sorted(missing)}, but a molora folder records everything; leave them out")


def _base_class(folder: Path, name: str) -> Any:
    import transformers

    cls = getattr(transformers, name, None) if name.isidentifier() else None
    auto = name.startswith("AutoModel") and hasattr(cls, "from_pretrained")
    if auto or (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        return cls
    raise TargetError(
        f"{folder}: its base class {name[:100]!r} is not one of transformers; use molora.load(base, folder)"
    )
