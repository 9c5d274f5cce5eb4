"""Folders of MoLA's code: a PEFT LoRA config whose ``r`` is a list, one rank a layer, and adapter_model.bin.

Keys: ``base_model.model.<linear>.lora_A_{e}.weight``, ``.lora_B_{e}.weight`` and ``.router.router.weight`` (E, in).
Neither the number of experts nor ``top_k`` is recorded: the first is counted, the second asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.names import PREFIX
from molora.adapter.peft_lora import PICKLE
from molora.adapter.peft_lora_config import PEFT_TYPE
from molora.config.strict import PerLayer
from molora.errors import AdapterError, ConfigError
from molora.interop.foreign import Asked, Foreign, in_model, read_config, read_tensors, targets
from molora.recipes import RECIPES
from molora.surgery.targets import candidates, ends_with

__all__ = ["FILES", "PICKLES", "read", "recognises"]

FILES: tuple[str, ...] = (CONFIG, WEIGHTS)
PICKLES: tuple[str, ...] = (PICKLE,)

# Options of PEFT's config that MoLA's code does not have, or that add what is no expert.
UNKNOWN = ("bias", "modules_to_save", "fan_in_fan_out", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
_EXPERT = re.compile(r"(.+)\.lora_([AB])_(0|[1-9][0-9]{0,3})\.weight")
_ROUTER = re.compile(r"(.+)\.router\.router\.weight")


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """An adapter_config.json of peft_type LORA with a list of ranks, which PEFT's own never has."""
    return config.get("peft_type") == PEFT_TYPE and isinstance(config.get("r"), list)


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """The mixture as recipe ``mola`` with ``released=True``: the balance loss pooled as in that code.

    ``top_k``: a number, or one for each layer. The balance coefficient is not recorded and stays the recipe's 1e-3.

    Raises:
        AdapterError, ConfigError: for a config or weights that do not fit together or do not fit the model.
    """
    config = read_config(folder / CONFIG)
    bad = [k for k in UNKNOWN if config.get(k) not in (None, False, "none", [], {})]
    if bad:
        raise AdapterError(
            f"{folder / CONFIG}: got {bad[0]}={str(config[bad[0]])[:100]}, expected experts and routers only"
        )
    top_k = asked.take("top_k", PerLayer, "how many experts a token uses, one number or one for each layer", "top_k=2")
    banks, routers = _sorted(folder, read_tensors(folder, WEIGHTS, PICKLE, asked))
    names, found = in_model(folder, routers, model), candidates(model)
    tensors: dict[str, Tensor] = {}
    ranks: dict[int, int] = {}
    counts: dict[int, int] = {}
    for name, router in routers.items():
        layer, E = found[names[name]].layer, router.shape[0]
        A, B, r = _packed(folder, name, banks.get(name, {}), E)
        for what, table, value in (("experts", counts, E), ("ranks", ranks, r)):
            if table.setdefault(layer, value) != value:
                raise AdapterError(f"{folder}: {name}: {value} {what}, other linears of its layer have {table[layer]}")
        tensors |= {
            f"{names[name]}.{part}": t
            for part, t in (("bank.lora_A", A), ("bank.lora_B", B), ("router.weight", router))
        }
    _check_ranks(folder, config["r"], ranks)
    stacks = {found[names[n]].stack for n in routers}
    _check_targets(folder, config, [p for p, c in found.items() if c.stack in stacks], names.values())
    layers = 1 + max(c.layer for c in found.values() if c.stack in stacks)
    options: dict[str, Any] = {
        "r": _by_layer(ranks, layers),
        "num_experts": _by_layer(counts, layers),
        "top_k": top_k,
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets(model, names.values()),
    }
    try:
        return Foreign(RECIPES["mola"](released=True, **options), tensors=tensors)
    except ConfigError as e:
        raise AdapterError(f"{folder} with top_k={top_k}: {e}") from e


def _sorted(
    folder: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[tuple[int, str], Tensor]], dict[str, Tensor]]:
    """Experts by module, expert and letter; routers by module."""
    banks: dict[str, dict[tuple[int, str], Tensor]] = {}
    routers: dict[str, Tensor] = {}
    for key, t in tensors.items():
        name = key.removeprefix(PREFIX)
        expert, router = _EXPERT.fullmatch(name), _ROUTER.fullmatch(name)
        if t.ndim != 2 or not (expert or router):
            raise AdapterError(
                f"{folder}: got {key[:200]!r} of shape {tuple(t.shape)}, expected experts and routers only"
            )
        if router:
            routers[router[1]] = t
        elif expert:
            banks.setdefault(expert[1], {})[int(expert[3]), expert[2]] = t
    if len(routers) + sum(map(len, banks.values())) != len(tensors):
        raise AdapterError(f"{folder}: some of its {len(tensors)} tensors stand twice, with and without {PREFIX!r}")
    odd = sorted(banks.keys() ^ routers.keys())
    if odd or not routers:
        what = (
            f"{odd[0]} has {'experts and no router' if odd[0] in banks else 'a router and no experts'}"
            if odd
            else "no router"
        )
        raise AdapterError(f"{folder}: {what}, expected both for each linear; the checkpoint is not whole")
    return banks, routers


def _packed(
    folder: Path, name: str, parts: Mapping[tuple[int, str], Tensor], experts: int
) -> tuple[Tensor, Tensor, int]:
    """A (E r, in), B (out, E r) and r of one linear, as many experts as its router has rows."""
    expected = {(e, letter) for e in range(experts) for letter in "AB"}
    if parts.keys() != expected:
        odd = sorted(parts.keys() ^ expected)[0]
        raise AdapterError(
            f"{folder}: {name}: lora_{odd[1]}_{odd[0]} is {'missing' if odd in expected else 'one too many'}: "
            f"its router has {experts} experts"
        )
    forms = {(parts[e, "A"].shape, parts[e, "B"].shape) for e in range(experts)}
    A_shape, B_shape = next(iter(forms))
    if len(forms) > 1 or A_shape[0] != B_shape[1]:
        raise AdapterError(
            f"{folder}: {name}: its experts have the shapes {sorted(forms)[:3]}, expected (r, in) and (out, r)"
        )
    A, B = ([parts[e, letter] for e in range(experts)] for letter in "AB")
    return torch.cat(A), torch.cat(B, dim=1), A_shape[0]


def _check_targets(folder: Path, config: Mapping[str, Any], paths: Iterable[str], held: Collection[str]) -> None:
    """AdapterError for a linear that the config names and the file says nothing of: its router would be lost."""
    said = config.get("target_modules")
    if not isinstance(said, list) or config.get("layers_to_transform") is not None:
        return
    lost = [p for p in paths if p not in held and any(isinstance(n, str) and ends_with(p, n) for n in said)]
    if lost:
        raise AdapterError(f"{folder}: {lost[0]} is named by target_modules and has no experts; the file is not whole")


def _check_ranks(folder: Path, recorded: list[Any], ranks: Mapping[int, int]) -> None:
    for layer, r in ranks.items():
        if layer >= len(recorded) or recorded[layer] != r:
            said = recorded[layer] if 0 <= layer < len(recorded) else "nothing"
            raise AdapterError(
                f"{folder}: layer {layer}: its experts have rank {r}, the config's r says {str(said)[:50]}"
            )


def _by_layer(values: Mapping[int, int], layers: int) -> PerLayer:
    """One number where all adapted layers agree, else one for each layer; a layer without any takes the first's."""
    some = next(iter(values.values()))
    return some if len(set(values.values())) == 1 else tuple(values.get(i, some) for i in range(layers))
