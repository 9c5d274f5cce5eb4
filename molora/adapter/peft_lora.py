"""PEFT LoRA folders, read without PEFT: adapters become experts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.adapter.atomic_save import CONFIG, CONFIG_LIMIT, WEIGHTS
from molora.adapter.names import PREFIX, renamings
from molora.adapter.peft_lora_config import refuse, saved_names, scale, targeted_parameter
from molora.adapter.peft_lora_stacked import module_of, parted, stacked_names
from molora.adapter.pickle_file import load_pickle
from molora.adapter.safetensors_file import TensorFile
from molora.adapter.strict_json import read_object
from molora.errors import AdapterError, nearest

__all__ = ["LoraAdapter", "align", "read_peft_lora", "renaming"]

PICKLE = "adapter_model.bin"
HEADER_LIMIT = 4 << 20  # bytes; a module's two tensors take about 300
STRANGERS = {
    "lora_embedding_": "an embedding's LoRA",
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_": "not a plain LoRA matrix",
}

Module = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class LoraAdapter:
    """One LoRA: per module path A (r, in_features), B (out_features, r) and the factor of B A.

    A and B are stored this way round whatever ``fan_in_fan_out`` says: that is about the base weight (GPT-2's Conv1D),
    to which PEFT would add the transpose of B A. ``saved``: parameters of modules that were trained whole, by their
    names in the base, and ``saved_names`` the config's names for them. ``parameters``: modules that PEFT reached as
    parameters; there it takes the weight as it is stored. ``fused``: LoRAs of stacked experts by the parameter's path,
    A (E r, in) and B (out, E r) expert after expert; ``stacks``: what the file has of them, until the model says whose
    they are (:func:`molora.adapter.peft_lora_stacked.placed`). ``bases``: frozen tensors of adapted modules, by module
    and name; PEFT writes those of an output layer that is adapted, and puts them back when it loads.
    """

    folder: str
    modules: dict[str, Module]
    base_model_name: str | None
    saved: dict[str, Tensor] = field(default_factory=dict)
    saved_names: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    fused: dict[str, Module] = field(default_factory=dict)
    stacks: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    bases: dict[tuple[str, str], Tensor] = field(default_factory=dict)


def read_peft_lora(
    folder: str | os.PathLike[str],
    *,
    allow_pickle: bool = False,
    allow_saved: bool = False,
    allow_stacked: bool = False,
) -> LoraAdapter:
    """Read a PEFT LoRA folder: ranks from the shapes, scale alpha / r or alpha / sqrt(r), per-module patterns.

    ``allow_pickle`` admits ``adapter_model.bin``, read with ``weights_only=True``, where there is no safetensors file;
    ``allow_saved`` whole trained modules (``modules_to_save``), and ``allow_stacked`` LoRAs of the base's own stacked
    experts (``target_parameters``), neither of which an expert of a mixture can have.

    Raises:
        AdapterError: for anything that is not plain LoRA on linears, or not whole; with the file and the remedy.
    """
    folder = Path(folder)
    try:
        config = read_object(folder / CONFIG, CONFIG_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise AdapterError(f"{folder}: there is no {CONFIG}; expected a PEFT LoRA folder") from e
    refuse(folder / CONFIG, config)
    names = saved_names(folder / CONFIG, config)
    if names and not allow_saved:
        raise AdapterError(
            f"{folder / CONFIG}: got modules_to_save={str(names)[:100]}, expected none: whole trained modules cannot "
            "be mixed; train them with molora's own modules_to_save"
        )
    stacked = stacked_names(folder / CONFIG, config)
    if stacked and not allow_stacked:
        raise AdapterError(
            f"{folder / CONFIG}: got target_parameters={list(stacked[:3])}, the base model's own experts, expected "
            "linears: these are reached through the base's router, which no gate of a mixture can follow; "
            "molora.load(base, folder) takes the adapter as it is, alone"
        )
    tensors = _tensors(folder, allow_pickle)
    saved = {k: t for k, t in tensors.items() if any(f".{n}." in f".{k}" for n in names) and _split(k)[1] is None}
    others = [k for k in tensors if _split(k)[1] is None]
    adapted = {_split(k)[0] for k in tensors.keys() - others}
    bases = {k: parts for k in others if (parts := _of_base(k))[0] in adapted}
    found = _pairs(folder, {k: t for k, t in tensors.items() if k not in saved and k not in bases})
    pairs, stacks = parted(folder / CONFIG, config, found, stacked)
    name = config.get("base_model_name_or_path")
    return LoraAdapter(
        folder=str(folder),
        modules={path: (A, B, scale(folder / CONFIG, config, path, A.shape[0])) for path, (A, B) in pairs.items()},
        base_model_name=name if isinstance(name, str) and name else None,
        saved={k.removeprefix(PREFIX): t for k, t in saved.items()},
        saved_names=tuple(names),
        parameters=tuple(path for path in pairs if targeted_parameter(config, path)),
        stacks=stacks,
        settings=config,
        bases={parts: tensors[k] for k, parts in bases.items()},
    )


def _tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        return TensorFile(folder / WEIGHTS, header_limit=HEADER_LIMIT).load()[0]
    except FileNotFoundError:
        pass
    try:
        return load_pickle(folder / PICKLE, allow_pickle=allow_pickle)
    except FileNotFoundError as e:
        raise AdapterError(f"{folder}: there is no {WEIGHTS}; expected a PEFT LoRA folder with its weights") from e


def _pairs(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module path."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key, t in tensors.items():
        path, letter = _split(key)
        if letter is None:
            what = next((v for k, v in STRANGERS.items() if k in key), "a whole trained module or bias")
            raise AdapterError(f"{folder}: got {key[:200]!r}, {what}; expected LoRA matrices of linears only")
        if t.ndim != 2 or not t.is_floating_point():
            got = f"{t.dtype} of shape {tuple(t.shape)}{', a convolution' if t.ndim > 2 else ''}"
            raise AdapterError(f"{folder}: {key[:200]}: got {got}; expected a floating-point matrix")
        if letter in halves.setdefault(path, {}):
            raise AdapterError(f"{folder}: {path}: lora_{letter} stands twice, with and without an adapter name")
        halves[path][letter] = t
    for path, h in halves.items():
        if h.keys() != {"A", "B"}:
            raise AdapterError(f"{folder}: {path}: has lora_{next(iter(h))} alone, expected lora_A and lora_B")
        if h["A"].shape[0] != h["B"].shape[1] or 0 in (*h["A"].shape, *h["B"].shape):
            got = f"A {tuple(h['A'].shape)} and B {tuple(h['B'].shape)}"
            raise AdapterError(f"{folder}: {path}: got {got}, expected (r, in) and (out, r)")
    if not halves:
        raise AdapterError(f"{folder}: holds no tensors, expected LoRA matrices")
    return {path: (halves[path]["A"], halves[path]["B"]) for path in sorted(halves)}


def _split(key: str) -> tuple[str, str | None]:
    """``base_model.model.<path>.lora_A[.default].weight`` to (path, "A"); (key, None) for any other tensor."""
    parts = key.removeprefix(PREFIX).split(".")
    if parts[-2:-1] == ["default"] and len(parts) > 2:
        del parts[-2]
    if len(parts) < 3 or parts[-1] != "weight" or parts[-2] not in ("lora_A", "lora_B") or not all(parts):
        return key, None
    return ".".join(parts[:-2]), parts[-2][-1]


def _of_base(key: str) -> tuple[str, str]:
    """``base_model.model.<path>.base_layer.<name>`` to (path, name); ("", "") for any other tensor."""
    path, found, name = key.removeprefix(PREFIX).rpartition(".base_layer.")
    return (path, name) if found else ("", "")


def align(adapter: LoraAdapter, module_paths: Iterable[str]) -> dict[str, Module]:
    """The adapter's modules under the names of a model that has ``module_paths``.

    The names as they are, or all of them with one and the same prefix added or removed: an adapter of a bare backbone
    on a model with a head, or the other way round.

    Raises:
        AdapterError: when no such way, or more than one, puts every module onto one of the model's.
    """
    new_name = renaming(adapter, module_paths)
    return {new_name[n]: m for n, m in adapter.modules.items()}


def renaming(adapter: LoraAdapter, module_paths: Iterable[str]) -> dict[str, str]:
    """The adapter's names of modules, also of those trained whole, to the model's; errors as :func:`align`."""
    wholes = sorted({n.rpartition(".")[0] for n in adapter.saved} | {module_of(n) for n in adapter.stacks})
    names, paths = [*adapter.modules, *wholes], dict.fromkeys(module_paths)
    ways = renamings(names, paths)
    if len(ways) == 1:
        return ways[0]
    if ways:
        got = ", ".join(w[names[0]] for w in ways[:3])
        raise AdapterError(f"{adapter.folder}: {names[0]} fits {got} alike; expected one match")
    missing = [n for n in names if n not in paths]
    lacks = "shares no module with the model" if len(missing) == len(names) else f"has {len(missing)} modules too many"
    made_for = f"; it was made for {adapter.base_model_name}" if adapter.base_model_name else ""
    raise AdapterError(
        f"{adapter.folder}: {lacks}: got {missing[0]}{nearest(missing[0], paths)} "
        f"Expected an adapter of this base model{made_for}"
    )
