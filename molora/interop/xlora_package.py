"""Folders of the ``xlora`` package (X-LoRA's reference code): today's layout, and those of its first releases.

``xlora_config.json`` and ``xlora_classifier.safetensors`` or ``.pt``; experts as PEFT LoRA folders by name, in
``adapters/`` (first releases), or beside ``X-LoRA/`` in ``X-LoRA_adapters/`` (the published model).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from molora.errors import AdapterError
from molora.interop.foreign import Asked, Foreign, experts, read_config, read_tensors
from molora.interop.xlora_assembly import Linear, assemble, given_adapters, linears

__all__ = ["FILES", "PICKLES", "read", "recognises"]

FILES: tuple[str, ...] = ("xlora_config.json", "xlora_classifier.safetensors")
PICKLES: tuple[str, ...] = ("xlora_classifier.pt",)

CONFIG = "xlora_config.json"
PUBLISHED, PUBLISHED_ADAPTERS = "X-LoRA", "X-LoRA_adapters"


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """An xlora_config.json, in the folder or in its X-LoRA/."""
    return (folder / CONFIG).is_file() or (folder / PUBLISHED / CONFIG).is_file()


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """The classifier and its experts; ``adapters={name: folder}`` where they are not in the folder.

    Before February 2024 the scaling pass ran with the experts at 1 / number of experts and no config said so; then
    ``scaling_pass_value`` is asked for. With both ``top_k_lora`` and ``enable_softmax_topk`` the package takes one
    softmax over all tokens of the batch; what comes out here takes it per token, as PEFT does, and warns.

    Raises:
        AdapterError, ConfigError: for gates per sequence (January 2024), and everything that does not fit together.
    """
    root = folder if (folder / CONFIG).is_file() else folder / PUBLISHED
    config = read_config(root / CONFIG)
    if "hidden_size" not in config:
        raise AdapterError(f"{root / CONFIG}: got no readable config with a hidden_size, expected that of the package")
    if "use_mean_pool" in config:
        raise AdapterError(
            f"{root / CONFIG}: got use_mean_pool, of a release whose gates were the same for a whole sequence; "
            "expected gates per token (any later release)"
        )
    adapters = _adapters(folder, root, config, asked)
    if "scaling_pass_value" not in config:
        meaning = (
            f"what the experts are multiplied by in the first pass (1/{len(adapters)} when it was trained, 0 today)"
        )
        value = asked.take("scaling_pass_value", float, meaning, f"scaling_pass_value={1 / len(adapters):.4g}")
        config = {**config, "scaling_pass_value": value}
    layers = linears(
        root, read_tensors(root, "xlora_classifier.safetensors", "xlora_classifier.pt", asked), "inner.", "last"
    )
    between = config.get("enable_relu_and_dropout", True)
    if not isinstance(between, bool):
        got = f"enable_relu_and_dropout={str(between)[:50]!r}"
        raise AdapterError(f"{root / CONFIG}: got {got}, expected true or false")
    if len(layers) > 1 and not between:
        layers, config = [_product(root, layers)], {**config, "xlora_depth": _linear_depth(root, config, layers)}
    foreign = assemble(root, config, experts(folder, model, adapters, asked), layers)
    if config.get("enable_softmax_topk") and config.get("top_k_lora"):
        warnings.warn(
            f"{root}: enable_softmax_topk: its package normalised the chosen gates over all tokens of the batch "
            "together; here they are normalised for each token, so outputs differ",
            stacklevel=4,
        )
    return foreign


def _adapters(folder: Path, root: Path, config: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """The experts' folders by name, in the order of the config; from the caller where they are not in the folder."""
    recorded = config.get("adapters") or {}
    names = list(recorded) if isinstance(recorded, dict | list) and all(isinstance(n, str) for n in recorded) else []
    if not names and recorded:
        raise AdapterError(f"{root / CONFIG}: adapters: got {str(recorded)[:200]}, expected names")
    given = given_adapters(asked, names, ordered=True)
    if given:
        return given
    places = {n: recorded[n] if isinstance(recorded, dict) else n for n in names}
    found = {n: _place(folder, root, n, str(path)) for n, path in places.items()}
    if names and all(found.values()):
        return found
    lost = ", ".join(f"{n!r}: '...'" for n in names) or "'math': '...', 'code': '...'"
    meaning = "the experts' PEFT LoRA folders by name, in the order they were trained in; they are not in this folder"
    return asked.take("adapters", dict, meaning, f"adapters={{{lost[:1000]}}}")  # type: ignore[no-any-return]


def _place(folder: Path, root: Path, name: str, path: str) -> Path | None:
    """The expert's folder in one of the places where the package or its authors kept it; never outside of the root."""
    last = path.rstrip("/").rpartition("/")[2]
    tries = [
        (root, name),
        (root / "adapters", name),
        (folder / PUBLISHED_ADAPTERS, name),
        (folder / PUBLISHED_ADAPTERS, last),
    ]
    plain = ((place, n) for place, n in tries if n and n not in (".", "..") and "/" not in n)
    found = (place / n for place, n in plain if os.path.isdir(place / n))  # False, too, for what can be no name
    return next((path for path in found if not path.is_symlink()), None)


def _product(root: Path, layers: Sequence[Linear]) -> Linear:
    """Linears with nothing between them are one linear: W = W_n ... W_1, b = W_n b' + b_n, in float64."""
    weight, bias = layers[0][0].double(), None if layers[0][1] is None else layers[0][1].double()
    for W, b in layers[1:]:
        if W.shape[1] != weight.shape[0]:
            raise AdapterError(
                f"{root}: the classifier's linears do not follow each other: {tuple(W.shape)} after "
                f"{tuple(weight.shape)}"
            )
        bias = None if bias is None or b is None else W.double() @ bias + b.double()
        weight = W.double() @ weight
    return weight.float(), None if bias is None else bias.to(torch.float32)


def _linear_depth(root: Path, config: Mapping[str, Any], layers: Sequence[Linear]) -> int:
    if config.get("xlora_depth") != len(layers):
        raise AdapterError(
            f"{root}: the classifier has {len(layers)} linears, its config says {config.get('xlora_depth')}"
        )
    return 1
