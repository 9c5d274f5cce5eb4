"""Folders of MoE-PEFT with a router on each linear: adapter_config.json of peft_type MOLA or LORAMOE.

Keys in adapter_model.bin, i a layer, e an expert, X a linear, P "mola" or "loramoe":

    P.layers.{i}.{self_attn|mlp}.X.moe_gate.weight    P.layers.{i}.{self_attn|mlp}.X.experts.{e}.lora_{A,B}.weight
    loramoe.layers.{i}.self_attn.X.lora_{A,B}.weight  (LORAMOE has plain LoRA there)

Its "mola" is MoLA with one number of experts for all layers; its "loramoe" weighs all experts of a feed-forward linear.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.peft_lora import PICKLE
from molora.config import GateConfig, MoloraConfig
from molora.errors import AdapterError, ConfigError
from molora.interop.foreign import Asked, Foreign, in_model, read_config, read_tensors, targets
from molora.interop.mixlora import expert_count, packed_experts, settings, warn_of_dora
from molora.recipes import RECIPES

__all__ = ["FILES", "PICKLES", "read", "recognises"]

FILES: tuple[str, ...] = (CONFIG, WEIGHTS)
PICKLES: tuple[str, ...] = (PICKLE,)

KINDS = {"MOLA": "mola", "LORAMOE": "loramoe"}  # peft_type to the keys' prefix, which is the routing_strategy, too
_LINEAR = r"\.(layers\.\d{1,4}\.(?:self_attn|mlp)\.\w+)"
_GATE = re.compile(rf"(\w+){_LINEAR}\.moe_gate\.weight")
_EXPERT = re.compile(rf"(\w+){_LINEAR}\.experts\.(\d{{1,4}})\.lora_([AB])\.weight")
_PLAIN = re.compile(rf"(loramoe){_LINEAR}\.lora_([AB])\.weight")


@dataclass
class _Weights:
    """The file's tensors by linear: routers; experts by number and letter; plain LoRA by letter."""

    routers: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, str], Tensor]] = field(default_factory=dict)
    plain: dict[str, dict[tuple[int, str], Tensor]] = field(default_factory=dict)


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """An adapter_config.json of peft_type MOLA or LORAMOE."""
    kind = config.get("peft_type")
    return isinstance(kind, str) and kind in KINDS


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """MOLA: softmax, top-k, sum to 1, per linear. LORAMOE: softmax over all experts per linear of feed-forward blocks.

    MOLA gets the balance loss that this code shares with its MixLoRA, coefficient 1e-3, which the folder does not
    record; LORAMOE has none. Loaded with ``use_dora``, that code computes plain LoRA; so does this, with a warning.

    Raises:
        AdapterError: for a config or weights that do not fit together or do not fit the model.
    """
    config = read_config(folder / CONFIG)
    prefix, own = KINDS[config["peft_type"]], settings(folder, config, None)
    if config.get("routing_strategy", prefix) != prefix:
        raise AdapterError(
            f"{folder / CONFIG}: got routing_strategy={str(config['routing_strategy'])[:50]!r} with peft_type "
            f"{config['peft_type']!r}, expected {prefix!r}"
        )
    E, weights = expert_count(folder, config), _sorted(folder, prefix, read_tensors(folder, WEIGHTS, PICKLE, asked))
    names = in_model(folder, [*weights.experts, *weights.plain], model)
    tensors: dict[str, Tensor] = {}
    for table, experts in ((weights.experts, E), (weights.plain, 1)):
        for name, parts in table.items():
            A, B = packed_experts(folder, name, parts, experts, own["r"])
            tensors |= {f"{names[name]}.bank.lora_A": A, f"{names[name]}.bank.lora_B": B}
    for name, router in weights.routers.items():
        if router.ndim != 2 or router.shape[0] != E:
            raise AdapterError(
                f"{folder}: {name}: the router has shape {tuple(router.shape)}, the config says num_experts={E}"
            )
        tensors[f"{names[name]}.router.weight"] = router
    warn_of_dora(folder, config)
    mixture = _mola if prefix == "mola" else _dense
    common = {"released": True, "target_modules": targets(model, names.values()), **own}
    try:
        return Foreign(mixture(config, common, E), tensors=tensors)
    except ConfigError as e:
        raise AdapterError(f"{folder}: its config is not valid: {e}") from e


def _sorted(folder: Path, prefix: str, tensors: Mapping[str, Tensor]) -> _Weights:
    out = _Weights()
    for key, t in tensors.items():
        if (m := _GATE.fullmatch(key)) and m[1] == prefix:
            out.routers[m[2]] = t
        elif (m := _EXPERT.fullmatch(key)) and m[1] == prefix:
            out.experts.setdefault(m[2], {})[int(m[3]), m[4]] = t
        elif (m := _PLAIN.fullmatch(key)) and m[1] == prefix:
            out.plain.setdefault(m[2], {})[0, m[3]] = t
        else:
            raise AdapterError(
                f"{folder}: got the tensor {key[:200]!r}, expected routers, experts and plain LoRA under {prefix!r}"
            )
    placed = len(out.routers) + sum(len(parts) for table in (out.experts, out.plain) for parts in table.values())
    if placed != len(tensors):
        raise AdapterError(f"{folder}: some of its {len(tensors)} tensors stand twice, under numbers of two spellings")
    odd = sorted(out.routers.keys() ^ out.experts.keys())
    if odd or not out.routers:
        fault = f"{odd[0]} has only one of router and experts" if odd else "it has no router"
        raise AdapterError(f"{folder}: {fault}; the checkpoint is not whole")
    misplaced = [n for n in out.experts if prefix == "loramoe" and ".mlp." not in n]
    misplaced += [n for n in out.plain if ".mlp." in n]
    if misplaced:
        kind = "router" if misplaced[0] in out.experts else "plain LoRA"
        raise AdapterError(
            f"{folder}: {misplaced[0]}: got a {kind} there, expected "
            f"{prefix!r} to have routers on feed-forward linears and plain LoRA on attention"
        )
    return out


def _mola(config: Mapping[str, Any], common: dict[str, Any], experts: int) -> MoloraConfig:
    mixture = RECIPES["mola"](num_experts=experts, top_k=config.get("top_k", 2), **common)
    shared = RECIPES["mixlora"](released=True).placements[0].balance
    return mixture.replace(placements=(mixture.placements[0].replace(balance=shared),))


def _dense(config: Mapping[str, Any], common: dict[str, Any], experts: int) -> MoloraConfig:
    """A router and experts on each linear of the blocks, all of them weighed; plain LoRA on the rest."""
    mixed = RECIPES["mola"](num_experts=experts, top_k=1, **common)
    dense = mixed.placements[0].replace(select="ffn", gate=GateConfig(), balance=())
    plain = RECIPES["lora"](**common).placements[0].replace(select="rest")
    return mixed.replace(recipe="loramoe", placements=(dense, plain))
