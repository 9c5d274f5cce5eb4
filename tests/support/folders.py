"""A small adapter made by hand, saved, and changed in ways that leave its other promises kept.

``python -m tests.support.folders tests/fixtures/format_1`` wrote that fixture. A format that was released is never
written anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.config import checksum
from molora.adapter.folder import load_tensors, read_adapter, write_adapter
from molora.adapter.strict_json import read_object
from molora.config import MoloraConfig
from molora.config.site import SiteConfig
from molora.recipes import RECIPES

FINGERPRINT = {
    "base_model_name_or_path": "org/base",
    "class": "Net",
    "hidden_size": 4,
    "num_layers": 2,
    "vocab_size": None,
    "config_sha256": "0" * 64,
}
PATHS = ("layers.0.up", "layers.1.up")


def small_config() -> MoloraConfig:
    """The recipe whose routers hold most: a weight and a bias for the choice."""
    return RECIPES["smora"](r=4, top_k=2)


def small_sites() -> tuple[SiteConfig, ...]:
    """Two linears from 4 to 6 with four experts of rank 1."""
    sizes = {"in_features": 4, "out_features": 6, "num_experts": 4, "ranks": (1,), "scales": (8.0,), "top_k": 2}
    return tuple(SiteConfig(path=p, placement=0, layer=i, index=i, **sizes) for i, p in enumerate(PATHS))


def small_tensors(value: float | None = None) -> dict[str, Tensor]:
    """Their tensors: all equal to ``value``, or random."""
    shapes = {"bank.lora_A": (4, 4), "bank.lora_B": (6, 4), "router.weight": (4, 4), "router.select_bias": (4,)}
    g = torch.Generator().manual_seed(0)
    return {
        f"{path}.{name}": torch.randn(shape, generator=g) if value is None else torch.full(shape, value)
        for path in PATHS
        for name, shape in shapes.items()
    }


def save(folder: Path, tensors: Mapping[str, Tensor] | None = None, card: str = "a molora adapter") -> Path:
    """Save the small adapter into ``folder``."""
    tensors = small_tensors() if tensors is None else tensors
    write_adapter(
        folder, config=small_config(), sites=small_sites(), tensors=tensors, fingerprint=FINGERPRINT, card=card
    )
    return folder


def load(folder: Path) -> dict[str, Tensor]:
    """Everything that reading a folder means, short of a model."""
    return load_tensors(read_adapter(folder))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder by name."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def forge(
    folder: Path, *, weights: bytes | None = None, edit: Callable[[dict[str, Any]], object] | None = None
) -> Path:
    """Put other weights or an edited config into ``folder``, with digest and checksum made to fit: a forger's work."""
    config = read_object(folder / CONFIG, 1 << 24)
    if weights is not None:
        (folder / WEIGHTS).write_bytes(weights)
        config["sha256"] = hashlib.sha256(weights).hexdigest()
    if edit is not None:
        edit(config)
    config["checksum"] = checksum(config)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def parts(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def joined(header: Any, data: bytes) -> bytes:
    """A safetensors file of a header (an object, or text as it is) and data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


if __name__ == "__main__":
    save(Path(sys.argv[1]))
