"""A foreign format: a folder with one LoRA in ``lora.json`` and ``lora.safetensors``, names of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from molora import recipes
from molora.errors import AdapterError
from molora.interop.foreign import Asked, Foreign
from molora.interop.importers import IMPORTERS


class OwnLora:
    """``lora.json``: {"rank": r, "alpha": a}; tensors ``<path>/down`` (r, I) and ``<path>/up`` (O, r)."""

    FILES, PICKLES = ("lora.json", "lora.safetensors"), ()

    @staticmethod
    def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
        """By its JSON file."""
        return (folder / "lora.json").is_file()

    @staticmethod
    def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
        """A mixture of one."""
        try:
            settings, tensors = json.loads((folder / "lora.json").read_text()), load_file(folder / "lora.safetensors")
            rank, alpha = int(settings["rank"]), float(settings["alpha"])
        except (OSError, ValueError, KeyError) as e:
            raise AdapterError(f"{folder}: cannot be read as a LoRA of its own format: {e}") from e
        paths = sorted({name.partition("/")[0] for name in tensors})
        config = recipes.lora(r=rank, lora_alpha=alpha, target_modules=paths)
        own = {f"{p}.bank.lora_A": tensors[f"{p}/down"] for p in paths}
        return Foreign(config, tensors=own | {f"{p}.bank.lora_B": tensors[f"{p}/up"] for p in paths})


IMPORTERS["its own"] = OwnLora()
