"""PEFT's X-LoRA folders: the classifier in adapter_model.safetensors, the experts in folders that the config names.

PEFT 0.21 numbers the experts, sorts its config's entries by name, and loses classifier tensors when it saves; nor are
the numbered folders that it writes beside the classifier whole. So experts come from their own folders.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.peft_lora import PICKLE
from molora.errors import AdapterError
from molora.interop.foreign import Asked, Foreign, experts, read_config, read_tensors
from molora.interop.xlora_assembly import assemble, given_adapters, linears

__all__ = ["CLASSIFIER", "FILES", "PEFT_TYPE", "PICKLES", "read", "recognises"]

FILES: tuple[str, ...] = (CONFIG, WEIGHTS)
PICKLES: tuple[str, ...] = (PICKLE,)

PEFT_TYPE = "XLORA"
CLASSIFIER = "base_model.internal_xlora_classifier.layers."


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """An adapter_config.json of peft_type XLORA."""
    return config.get("peft_type") == PEFT_TYPE


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """The classifier and its experts; ``adapters={name: folder}`` where the config's paths lead out of the folder.

    Raises:
        AdapterError, ConfigError: for missing classifier tensors, experts that do not fit it, or cannot be found.
    """
    config = read_config(folder / CONFIG)
    recorded = config.get("adapters")
    if not isinstance(recorded, dict) or not all(isinstance(v, str) for v in recorded.values()):
        raise AdapterError(f"{folder / CONFIG}: adapters: got {str(recorded)[:200]}, expected an object of folders")
    names = list(recorded)
    numbered = sorted(names) == sorted(map(str, range(len(names))))  # the names that this PEFT gives and needs
    names = sorted(names, key=int) if numbered else names
    adapters = given_adapters(asked, names, numbered)
    if not adapters:
        inside = {n: _inside(folder, recorded[n]) for n in names}
        found = {n: path for n, path in inside.items() if path is not None}
        sure = (numbered or len(names) == 1) and not config.get("use_trainable_adapters")
        adapters = dict(found) if sure and len(found) == len(names) > 0 else _ask(asked, names, recorded)
    weights = read_tensors(folder, WEIGHTS, PICKLE, asked)
    layers = linears(folder, weights, CLASSIFIER)
    return assemble(folder, config, experts(folder, model, adapters, asked), layers)


def _inside(folder: Path, path: str) -> Path | None:
    """The expert's folder, if it lies in this folder: nothing else is opened by a name out of a file."""
    if not path.isprintable():
        return None
    root = folder.resolve()
    inner = (root / path).resolve()
    return inner if inner != root and inner.is_relative_to(root) and os.path.isdir(inner) else None


def _ask(asked: Asked, names: list[str], recorded: Mapping[str, Any]) -> Any:
    shown = ", ".join(f"{n!r}: {recorded[n]!r}" for n in names)[:1000]
    meaning = (
        "the experts' PEFT LoRA folders, in the order they were trained in, which its config (sorted by name) does not "
        "keep; if they trained with the classifier, the trained ones. No path out of the folder is followed"
    )
    return asked.take("adapters", dict, meaning, f"adapters={{{shown}}}")
