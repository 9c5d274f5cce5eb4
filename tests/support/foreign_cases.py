"""The tiny folders of every foreign format, and how a test damages one and sees it refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import molora
from molora.errors import MoloraError
from tests.support import foreign_folders as write
from tests.support.behaviours import snapshot
from tests.support.tiny import base_model

CLASSIFIER = "base_model.internal_xlora_classifier.layers."


def peft_xlora(folder: Path) -> None:
    """PEFT's layout, with the experts' folders inside."""
    loras = write.loras(folder, {"0": 4, "1": 2})
    config = {**write.xlora_config(), "peft_type": "XLORA", "adapters": {n: str(f) for n, f in loras.items()}}
    head = write.xlora_head([f"{CLASSIFIER}0", f"{CLASSIFIER}3"], 28)
    write.write(folder, config, head, "adapter_model.safetensors")


# Format: how its folder is written, the file of its weights, and what it needs to be told.
FORMATS: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
    "peft_lora": (lambda f: write.loras(f.parent, {f.name: 2}), "adapter_model.safetensors", {}),
    "peft_xlora": (peft_xlora, "adapter_model.safetensors", {}),
    "xlora": (
        lambda f: write.write_xlora(f, f, write.xlora_config(), write.xlora_head(["inner.0", "last"], 28)),
        "xlora_classifier.safetensors",
        {},
    ),
    "mixlora": (
        lambda f: write.write(f, write.mixlora_config(), write.mixlora(), "adapter_model.safetensors"),
        "adapter_model.safetensors",
        {},
    ),
    "moe_peft_mola": (
        lambda f: write.write(f, write.moe_peft_config("mola"), write.moe_peft("mola"), "adapter_model.safetensors"),
        "adapter_model.safetensors",
        {},
    ),
    "moe_peft_loramoe": (
        lambda f: write.write(
            f, write.moe_peft_config("loramoe"), write.moe_peft("loramoe"), "adapter_model.safetensors"
        ),
        "adapter_model.safetensors",
        {},
    ),
    "mola": (
        lambda f: write.write(f, write.mola_config(), write.mola(), "adapter_model.safetensors"),
        "adapter_model.safetensors",
        {"top_k": 2},
    ),
    "meteora": (
        lambda f: write.write(f, None, write.meteora(), "model.safetensors"),
        "model.safetensors",
        {"top_k": 2, "adapters": ["a", "b", "c"], "lora_alpha": 4.0},
    ),
}


def refused(folder: Path, error: type[Exception], words: str, model: Any = None, **more: Any) -> None:
    """Loading raises ``error`` with ``words``, in one line or few, and leaves the model as it was."""
    model = base_model("llama", trainable=True) if model is None else model
    before = snapshot(model)
    with pytest.raises(error, match=words) as caught:
        molora.load(model, folder, **more)
    assert isinstance(caught.value, MoloraError)
    assert len(str(caught.value)) < 2000
    assert snapshot(model) == before


def edited(path: Path, edit: Callable[[write.Tensors], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file({k: t.contiguous() for k, t in tensors.items()}, path)
