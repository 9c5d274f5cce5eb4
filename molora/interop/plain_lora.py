"""PEFT LoRA folders as a mixture of one: recipe ``lora``, with the modules that were trained whole beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.peft_lora import PICKLE, LoraAdapter
from molora.adapter.peft_lora_config import PEFT_TYPE
from molora.config import MoloraConfig, Placement, RouterConfig
from molora.errors import AdapterError, ConfigError, nearest
from molora.interop.foreign import Asked, Foreign, read_config
from molora.surgery.ready_made import aligned
from molora.surgery.targets import ends_with

__all__ = ["FILES", "PICKLES", "read", "recognises"]

FILES: tuple[str, ...] = (CONFIG, WEIGHTS)
PICKLES: tuple[str, ...] = (PICKLE,)


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """An adapter_config.json of peft_type LORA; or none, and folders with one inside (several named adapters)."""
    return _is_lora(config) or (not config and bool(_named(folder)) and not any(folder.glob("*.json")))


def _is_lora(config: Mapping[str, Any]) -> bool:
    return config.get("peft_type") == PEFT_TYPE and not isinstance(config.get("r"), list)


def _named(folder: Path) -> list[str]:
    """Names of the adapters that PEFT saved into folders of their own; a Trainer's checkpoints are something else."""
    try:
        names = sorted(n for n in os.listdir(folder) if not n.startswith((".", "checkpoint-")))
    except OSError:
        return []
    return [
        n
        for n in names
        if (folder / n).is_dir() and not (folder / n).is_symlink() and _is_lora(read_config(folder / n / CONFIG))
    ]


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """One adapter of the folder; ``adapters="name"`` picks one of several that lie in folders of their own.

    Raises:
        ConfigError: when there are several and none was named.
        AdapterError: for what is not plain LoRA on linears of this model (PEFT's other methods among it).
    """
    named = _named(folder)
    meaning = f"which adapter to load, of {', '.join(named)}; to mix several, give their folders to molora.convert"
    if named and not (folder / CONFIG).exists():
        folder = _chosen(folder, named, asked.take("adapters", str, meaning, f"adapters={named[0]!r}"))
    elif named:
        picked = asked.optional("adapters", str, "")
        folder = _chosen(folder, named, picked) if picked else folder
    adapter = aligned(model, "default", str(folder), allow_pickle=asked.allow_pickle, alone=True)
    paths, tensors = _trained(adapter, model)
    placement = Placement(imported=True, router=RouterConfig(kind="fixed"))
    config = MoloraConfig(
        recipe="lora",
        placements=(placement,),
        target_parameters=tuple(sorted(adapter.fused)),
        adapters=(("default", str(folder)),),
        modules_to_save=tuple(paths),
    )
    return Foreign(config, {"default": adapter}, tensors)


def _chosen(folder: Path, named: Iterable[str], name: str) -> Path:
    if name not in named:
        raise ConfigError(f"load: adapters: got {name!r}, expected one of {', '.join(named)}{nearest(name, named)}")
    return folder / name


def _trained(adapter: LoraAdapter, model: nn.Module) -> tuple[list[str], dict[str, Tensor]]:
    """Modules that were trained whole, and their parameters under the names that the converted model gives them.

    PEFT writes the names of both usual heads, of which a model has one: a name that no module has means nothing.
    """
    paths = [p for p, _ in model.named_modules() if any(ends_with(p, n) for n in adapter.saved_names)]
    tensors = {
        f"{p}.trained.{n[len(p) + 1 :]}": t for n, t in adapter.saved.items() for p in paths if n.startswith(p + ".")
    }
    lost = [n for n in adapter.saved if not any(n.startswith(p + ".") for p in paths)]
    bare = [p for p in paths if not any(k.startswith(f"{p}.trained.") for k in tensors)]
    if lost or bare:
        fault = f"no module of the model has {lost[0]}" if lost else f"the file has no {bare[0]}"
        raise AdapterError(
            f"{adapter.folder}: modules_to_save: {fault}, expected the whole trained modules of this base"
        )
    return paths, tensors
