"""What the two X-LoRA formats share: experts by name, the head's linears, and the recipe that they make."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.adapter.peft_lora import LoraAdapter
from molora.errors import AdapterError, ConfigError
from molora.interop.foreign import Asked, Foreign
from molora.layers.mixture import HEAD
from molora.recipes import RECIPES

__all__ = ["Linear", "assemble", "given_adapters", "linears"]

Linear = tuple[Tensor, Tensor | None]
_SLOT = re.compile(r"0|[1-9][0-9]{0,5}")  # one way to write each number
# Options of the recipe that both formats record under the same names, with the defaults of both.
DEFAULTS: dict[str, Any] = {
    "enable_softmax": True,
    "enable_softmax_topk": False,
    "softmax_temperature": 1.0,
    "layerwise_scalings": False,
    "top_k_lora": None,
    "xlora_depth": 1,
    "xlora_size": 2048,
    "xlora_dropout_p": 0.2,
    "use_trainable_adapters": False,
    "scaling_pass_value": 0.0,
    "global_scaling_weight": 1.0,
}


def given_adapters(asked: Asked, names: Sequence[str], ordered: bool) -> dict[str, str | os.PathLike[str]]:
    """``adapters=`` of the caller in the order of the experts; empty where it was not given.

    The recorded order counts where it is reliable and the names agree, else the order in which they were given.
    """
    given = asked.optional("adapters", dict, {})
    if given and names and len(given) != len(names):
        raise ConfigError(
            f"load: adapters: got {len(given)} ({', '.join(map(str, given))}), but {asked.folder} mixes {len(names)} "
            f"({', '.join(names)}); expected a folder for each"
        )
    return {n: given[n] for n in names} if ordered and given and set(given) == set(names) else dict(given)


def linears(folder: Path, tensors: Mapping[str, Tensor], prefix: str, last: str = "") -> list[Linear]:
    """The head's linears from ``<prefix><slot>.weight|bias`` in the order of their slots, then those of ``last``.

    Raises:
        AdapterError: for a tensor of another name, a bias without its weight, or biases on some linears only.
    """
    found: dict[tuple[int, int], dict[str, Tensor]] = {}
    for key, t in tensors.items():
        start, _, kind = key.rpartition(".")
        slot = _SLOT.fullmatch(start.removeprefix(prefix)) if start.startswith(prefix) else None
        is_last = bool(last) and start == last
        if kind not in ("weight", "bias") or not (slot or is_last):
            raise AdapterError(
                f"{folder}: got the tensor {key[:200]!r}, expected those of the classifier's linears only"
            )
        found.setdefault((0, int(slot[0])) if slot else (1, 0), {})[kind] = t
    bare = [slot for slot, parts in found.items() if "weight" not in parts or parts["weight"].ndim != 2]
    if bare:
        raise AdapterError(f"{folder}: the classifier's linear {bare[0][1]} has no weight matrix, expected one")
    if len({"bias" in parts for parts in found.values()}) > 1:
        raise AdapterError(
            f"{folder}: some of the classifier's linears have a bias and some have none, expected one way"
        )
    return [(parts["weight"], parts.get("bias")) for _, parts in sorted(found.items())]


def assemble(
    folder: Path, recorded: Mapping[str, Any], adapters: Mapping[str, LoraAdapter], layers: Sequence[Linear]
) -> Foreign:
    """The recipe's config with the recorded options, and the head's tensors, checked against the experts.

    Raises:
        AdapterError: when the head has linears too few or too many, gates for other numbers of experts or modules,
            or the options do not go together.
    """
    options = {name: recorded.get(name, default) for name, default in DEFAULTS.items()}
    try:
        config = RECIPES["xlora"](adapters={n: a.folder for n, a in adapters.items()}, **options)
    except ConfigError as e:
        raise AdapterError(f"{folder}: its config is not valid: {e}") from e
    if len(layers) != options["xlora_depth"]:
        raise AdapterError(
            f"{folder}: the classifier has {len(layers)} linears, its config says "
            f"xlora_depth={options['xlora_depth']}. PEFT up to 0.21 loses classifier tensors when it saves: save "
            "model.state_dict()'s internal_xlora_classifier from the process that trained it, or train it again"
        )
    modules = len({path for a in adapters.values() for path in a.modules}) if options["layerwise_scalings"] else 1
    gates = layers[-1][0].shape[0]
    if gates != len(adapters) * modules:
        times = f" times {modules} adapted modules" if modules > 1 else ""
        raise AdapterError(
            f"{folder}: the classifier gives {gates} gates, expected {len(adapters) * modules}: "
            f"{len(adapters)} adapters{times}; the adapters are not the ones it was made for"
        )
    if layers[0][1] is None:
        bare = (p.replace(router=p.router.replace(bias=False)) for p in config.placements)
        config = config.replace(placements=tuple(bare))
    named = {
        f"{HEAD}.layers.{i}.{k}": t
        for i, pair in enumerate(layers)
        for k, t in zip(("weight", "bias"), pair, strict=True)
    }
    return Foreign(config, dict(adapters), {n: t for n, t in named.items() if t is not None})
