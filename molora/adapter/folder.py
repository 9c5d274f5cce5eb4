"""The adapter folder: PEFT's layout, safetensors only, and a config that says exactly what the weights are.

Reading trusts nothing: the config is bounded and strict, it decides which tensors of which shapes there must be, the
weights' header must agree before a tensor is allocated, and the bytes must have the digest that the config names. No
file is opened by a name out of a file, no pattern out of a file is run, and there is no pickle.
"""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.adapter.atomic_save import CONFIG, CONFIG_LIMIT, NEXT, WEIGHTS, save_folder, signature
from molora.adapter.config import (
    FORMAT,
    NAME,
    PEFT_TYPE,
    AdapterConfig,
    Header,
    checked,
    disagreements,
    expected_tensors,
)
from molora.adapter.fingerprint import fingerprint
from molora.adapter.names import PREFIX
from molora.adapter.safetensors_file import TensorFile
from molora.adapter.strict_json import read_object
from molora.config import MoloraConfig
from molora.config.site import SiteConfig
from molora.errors import AdapterError, CheckpointError

__all__ = [
    "Adapter",
    "Described",
    "check_fingerprint",
    "check_tensors",
    "describe",
    "expected_tensors",
    "fingerprint",
    "load_tensors",
    "read_adapter",
    "write_adapter",
]

MAX_KEYS = 64  # entries of one object in a config; ours have up to 20
ATTEMPTS = 100  # at reading a folder that is being saved into all the time


@dataclass(frozen=True)
class Described:
    """What a checked config says of an adapter: everything but the weights."""

    folder: Path
    config: MoloraConfig
    sites: tuple[SiteConfig, ...]
    fingerprint: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class Adapter(Described):
    """An adapter folder whose config, header and digest agree.

    ``tensors``: parameter name (without PEFT's prefix) to (shape, dtype). ``file`` holds the weights open, so that
    they stay the ones that were checked when somebody saves into the folder meanwhile.
    """

    tensors: Header
    file: TensorFile = field(repr=False, compare=False)


def write_adapter(
    folder: str | os.PathLike[str],
    *,
    config: MoloraConfig,
    sites: Sequence[SiteConfig],
    tensors: Mapping[str, Tensor],
    fingerprint: Mapping[str, Any],
    card: str,
    task_type: str | None = None,
) -> None:
    """Save an adapter folder: config, ``tensors`` (by parameter name, dtypes kept) and the model card ``card``.

    Staged: a reader sees the adapter that was there or this one, also after a crash. Saving the same adapter again
    gives the same bytes. Folders of ready-made adapters in the config are private and not written.

    Raises:
        CheckpointError: when the folder cannot be written or holds something else, when the tensors are not those of
            the sites, or hold NaN. What was in the folder stays.
    """
    document = describe(config, sites, fingerprint, task_type)
    check_tensors(folder, config, sites, tensors)
    save_folder(
        Path(folder),
        peft_type=PEFT_TYPE,
        tensors={PREFIX + name: t for name, t in tensors.items()},
        describe=lambda sha256: document.replace(sha256=sha256).text(),
        card=card,
    )


def describe(
    config: MoloraConfig, sites: Sequence[SiteConfig], fingerprint: Mapping[str, Any], task_type: str | None = None
) -> AdapterConfig:
    """The config file of an adapter, but for the digest of its weights."""
    base = dict(fingerprint)
    return AdapterConfig(
        peft_type=PEFT_TYPE,
        task_type=task_type,
        base_model_name_or_path=base.pop(NAME, None),
        molora_format=FORMAT,
        molora_version=_version(),
        r=config.placements[0].r,
        lora_alpha=config.placements[0].lora_alpha,
        target_modules=tuple(sorted({s.path.rpartition(".")[2] for s in sites})),
        config=config.without_folders(),
        sites=tuple(sites),
        fingerprint=base,
        sha256="",
        checksum="",
    )


def check_tensors(
    where: object, config: MoloraConfig, sites: Sequence[SiteConfig], tensors: Mapping[str, Tensor]
) -> None:
    """CheckpointError when ``tensors``, by parameter name, are not those of the sites, in names and shapes."""
    header = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    faults = disagreements(config, expected_tensors(config, sites), header)
    if faults:
        raise CheckpointError(f"{where}: these are not the weights that the config describes: {'; '.join(faults)}")


def read_adapter(folder: str | os.PathLike[str]) -> Adapter:
    """Everything of an adapter folder but the tensors, all of it checked; allocates little, whatever the files claim.

    Raises:
        AdapterError: with the file, the fault and the remedy, for a folder that is not one whole molora adapter.
    """
    folder = Path(folder)
    for _ in range(ATTEMPTS):
        before = signature(folder)
        try:
            return _read(folder)
        except AdapterError:
            if signature(folder) == before:  # nobody saved meanwhile: the fault is the folder's
                raise
            time.sleep(0.01)
    raise AdapterError(f"{folder}: is being saved into all the time; load it when the writer is done")


def load_tensors(adapter: Adapter, *, allow_nan: bool = False) -> dict[str, Tensor]:
    """The adapter's tensors by parameter name, on the CPU, in their saved dtypes.

    Raises:
        AdapterError: when the bytes are no longer those that were checked, or hold NaN or infinite values.
    """
    tensors, sha256 = adapter.file.load(allow_nan=allow_nan)
    if sha256 != adapter.sha256:
        raise AdapterError(f"{adapter.file.path}: was changed while it was read; load it again")
    return {name.removeprefix(PREFIX): t for name, t in tensors.items()}


def check_fingerprint(adapter: Described, model: nn.Module, ignore: bool = False) -> None:
    """Compare the base of ``adapter`` with ``model``; the name does not count. ``ignore`` accepts any base.

    Raises:
        AdapterError: showing both.
    """
    found = fingerprint(model)
    keys = [k for k in found if k != NAME and found[k] != adapter.fingerprint.get(k)]
    if keys and not ignore:
        raise AdapterError(
            f"{adapter.folder}: made for another base model; they differ in {', '.join(keys)}.\n"
            f"- adapter: {_line(adapter.fingerprint)}\n- model:   {_line(found)}\n"
            "Load the base that the adapter names, or pass ignore_base=True if the two are the same to you; "
            "shapes are checked in any case"
        )


def _line(fingerprint: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in fingerprint.items())


def _version() -> str:
    try:
        return importlib.metadata.version("molora")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is used without being installed
        return "unknown"


def _read(folder: Path) -> Adapter:
    """The folder as its config describes it, or as the next config does: a writer may be between its steps."""
    faults = []
    for name in (CONFIG, NEXT):
        try:
            return _read_with(folder, folder / name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except AdapterError as e:
            faults.append(e)
        except OSError as e:
            faults.append(AdapterError(f"{folder}: cannot be read ({e}), expected an adapter folder"))
    raise faults[0] if faults else AdapterError(_what_it_is(folder))


def _read_with(folder: Path, path: Path) -> Adapter:
    document, expected = checked(read_object(path, CONFIG_LIMIT, max_keys=MAX_KEYS), path)
    room = 4096 + sum(2 * len(name) + 200 for name in expected) + (1 << 20 if document.config.modules_to_save else 0)
    file = TensorFile(folder / WEIGHTS, header_limit=room)
    bare = [n for n in file.entries if not n.startswith(PREFIX)]
    if bare:
        raise AdapterError(f"{file.path}: got the tensor {bare[0][:200]!r}, expected names that start with {PREFIX!r}")
    tensors = {n.removeprefix(PREFIX): (e.shape, e.dtype) for n, e in file.entries.items()}
    faults = disagreements(document.config, expected, tensors)
    if faults:
        raise AdapterError(f"{file.path}: not the weights that {path.name} describes: {'; '.join(faults)}")
    if file.sha256() != document.sha256:
        raise AdapterError(
            f"{file.path}: its sha256 is not the one in {path.name}: the file was damaged or exchanged. "
            "Fetch or save the adapter again"
        )
    base = {NAME: document.base_model_name_or_path, **document.fingerprint}
    return Adapter(folder, document.config, document.sites, base, document.sha256, tensors, file)


def _what_it_is(folder: Path) -> str:
    """A sentence about a folder that is no adapter."""
    expected = f"expected an adapter folder with {CONFIG} and {WEIGHTS}"
    if not folder.is_dir():
        return f"{folder}: there is no such folder; {expected}"
    names = sorted(os.listdir(folder))
    runs = [n for n in names if n.startswith("checkpoint-") and (folder / n).is_dir()]
    models = [n for n in names if n.startswith(("model", "pytorch_model")) and n.endswith((".safetensors", ".bin"))]
    if runs:
        return f"{folder}: got a training run ({', '.join(runs[-3:])}), {expected}; load one of its checkpoints"
    if "adapter_model.bin" in names:
        return f"{folder}: got adapter_model.bin, a pickle that could run code, {expected}"
    if models:
        return f"{folder}: got a full model ({models[0]}), {expected}; load it with transformers"
    if "trainer_state.json" in names or "optimizer.pt" in names:
        return f"{folder}: got a training checkpoint without an adapter in it, {expected}"
    return f"{folder}: got a folder with {', '.join(names[:5]) or 'nothing in it'}, {expected}"
