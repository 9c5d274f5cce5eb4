"""Folders of MixLoRA and MoE-PEFT: adapter_config.json of peft_type MIXLORA, weights in adapter_model.bin.

Keys, i a layer, e an expert, X a linear (today's first, then those of ``routing_strategy`` "mixtral"):

    mixlora.layers.{i}.mlp.moe_gate.weight                    mixlora.layers.{i}.gate.weight
    mixlora.layers.{i}.mlp.X.experts.{e}.lora_{A,B}.weight    mixlora.layers.{i}.experts.{e}.X.lora_{A,B}.weight
    mixlora.layers.{i}.self_attn.X.lora_{A,B}.weight          the same
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.peft_lora import PICKLE
from molora.config import MoloraConfig
from molora.errors import AdapterError, ConfigError
from molora.interop.foreign import Asked, Foreign, in_model, read_config, read_tensors, targets
from molora.recipes import RECIPES

__all__ = ["FILES", "PICKLES", "expert_count", "packed_experts", "read", "recognises", "settings", "warn_of_dora"]

FILES: tuple[str, ...] = (CONFIG, WEIGHTS)
PICKLES: tuple[str, ...] = (PICKLE,)

PEFT_TYPE = "MIXLORA"
OLD_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
BASE_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")  # names in transformers' configs
_POINTS = torch.linspace(-4, 4, 33)
_GATE = re.compile(r"mixlora\.layers\.(\d{1,4})\.(?:mlp\.moe_gate|gate)\.weight")
_EXPERT = re.compile(r"mixlora\.layers\.(\d{1,4})\.mlp\.(\w+)\.experts\.(\d{1,4})\.lora_([AB])\.weight")
_OLD_EXPERT = re.compile(r"mixlora\.layers\.(\d{1,4})\.experts\.(\d{1,4})\.(\w+)\.lora_([AB])\.weight")
_PLAIN = re.compile(r"mixlora\.layers\.(\d{1,4})\.(self_attn\.\w+|mlp\.\w+)\.lora_([AB])\.weight")


@dataclass
class _Weights:
    """The file's tensors by what they are: routers by layer; experts and plain LoRAs by module, letter by letter."""

    routers: dict[str, Tensor] = field(default_factory=dict)
    experts: dict[str, dict[tuple[int, str], Tensor]] = field(default_factory=dict)
    plain: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """An adapter_config.json of peft_type MIXLORA."""
    return config.get("peft_type") == PEFT_TYPE


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """The mixture as recipe ``mixlora`` with ``released=True``: the balance loss as in that code, coefficient 1e-3.

    Not recorded are the balance coefficient and the jitter; they stay the recipe's. With ``use_dora`` the magnitudes
    are not in the file, and the released code makes them anew on loading, which leaves plain LoRA; so does this, with
    a warning. ``mixlora-switch`` is refused: that code skips the feed-forward block when it does not train.

    Raises:
        AdapterError: for a config or weights that do not fit together or do not fit the model.
    """
    config = read_config(folder / CONFIG)
    experts = settings(folder, config, config.get("expert_lora"))
    attention = settings(folder, config, None)
    _check_activation(folder / CONFIG, config.get("act_fn"), model)
    weights = _sorted(folder, read_tensors(folder, WEIGHTS, PICKLE, asked))
    E = expert_count(folder, config)
    names = in_model(folder, [*weights.experts, *weights.plain], model)
    tensors = _routers(folder, weights, names, E)
    for name, parts in weights.experts.items():
        A, B = packed_experts(folder, name, parts, E, experts["r"])
        tensors |= {f"{names[name]}.bank.lora_A": A, f"{names[name]}.bank.lora_B": B}
    for name, letters in weights.plain.items():
        A, B = packed_experts(folder, name, {(0, k): t for k, t in letters.items()}, 1, attention["r"])
        tensors |= {f"{names[name]}.bank.lora_A": A, f"{names[name]}.bank.lora_B": B}
    warn_of_dora(folder, config)
    chosen = targets(model, names.values())
    return Foreign(_mixture(folder, config, experts, attention, chosen), tensors=tensors)


def settings(folder: Path, config: Mapping[str, Any], expert: Any) -> dict[str, Any]:
    """r, lora_alpha, lora_dropout and use_rslora; an ``expert_lora`` overrides those of the whole."""
    merged = {"use_rslora": False, "lora_dropout": 0.0, **config, **(expert if isinstance(expert, dict) else {})}
    r = merged.get("r")
    if type(r) is not int or r < 1 or (expert is not None and not isinstance(expert, dict)):
        raise AdapterError(
            f"{folder / CONFIG}: r: got {str(r)[:50]}, expected a rank (expert_lora: an object with one)"
        )
    return {k: merged.get(k) for k in ("r", "lora_alpha", "lora_dropout", "use_rslora")}


def _check_activation(path: Path, name: Any, model: nn.Module) -> None:
    """AdapterError for an ``act_fn`` that computes something else than the base's own, which runs here."""
    if name is None:
        return
    text = getattr(getattr(model, "config", None), "get_text_config", lambda: None)()
    own = next((getattr(text, n) for n in BASE_ACTIVATIONS if isinstance(getattr(text, n, None), str)), None)
    known = isinstance(name, str) and name in ACT2FN
    if not known or own not in ACT2FN or not torch.allclose(ACT2FN[name](_POINTS), ACT2FN[own](_POINTS)):
        raise AdapterError(
            f"{path}: got act_fn={str(name)[:50]!r} for the experts, expected the base's own activation "
            f"({own}), which they share here"
        )


def expert_count(folder: Path, config: Mapping[str, Any]) -> int:
    """num_experts, or an AdapterError."""
    E = config.get("num_experts")
    if type(E) is not int or E < 1:
        raise AdapterError(f"{folder / CONFIG}: num_experts: got {str(E)[:50]}, expected a whole number of at least 1")
    return E


def warn_of_dora(folder: Path, config: Mapping[str, Any]) -> None:
    """A warning where the config says use_dora: that code never saves the magnitudes."""
    if config.get("use_dora") or (config.get("expert_lora") or {}).get("use_dora"):
        warnings.warn(
            f"{folder}: trained with use_dora, but without its magnitudes (that code never saves them): this is the "
            "LoRA in it, as that code itself computes after loading, and not what was trained",
            stacklevel=5,
        )


def _sorted(folder: Path, tensors: Mapping[str, Tensor]) -> _Weights:
    """Every tensor in its place, whichever of the two generations of names it has."""
    out = _Weights()
    for key, t in tensors.items():
        if m := _GATE.fullmatch(key):
            out.routers[m[1]] = t
        elif m := _EXPERT.fullmatch(key):
            out.experts.setdefault(f"layers.{m[1]}.mlp.{OLD_NAMES.get(m[2], m[2])}", {})[int(m[3]), m[4]] = t
        elif m := _OLD_EXPERT.fullmatch(key):
            out.experts.setdefault(f"layers.{m[1]}.mlp.{OLD_NAMES.get(m[3], m[3])}", {})[int(m[2]), m[4]] = t
        elif m := _PLAIN.fullmatch(key):
            out.plain.setdefault(f"layers.{m[1]}.{m[2]}", {})[m[3]] = t
        else:
            raise AdapterError(
                f"{folder}: got the tensor {key[:200]!r}, expected routers, experts and attention's LoRA"
            )
    placed = len(out.routers) + sum(map(len, out.experts.values())) + sum(map(len, out.plain.values()))
    if placed != len(tensors):
        raise AdapterError(f"{folder}: some of its {len(tensors)} tensors stand twice, under old names and new ones")
    if not out.routers or not out.experts:
        raise AdapterError(
            f"{folder}: holds {len(out.routers)} routers and experts of {len(out.experts)} linears; not whole"
        )
    return out


def packed_experts(
    folder: Path, name: str, parts: Mapping[tuple[int, str], Tensor], experts: int, r: int
) -> tuple[Tensor, Tensor]:
    """A (E r, in) and B (out, E r) of one linear."""
    expected = {(e, letter) for e in range(experts) for letter in "AB"}
    if parts.keys() != expected:
        odd = sorted(parts.keys() ^ expected)[0]
        what = "is missing" if odd in expected else f"is one too many for {experts} experts"
        raise AdapterError(f"{folder}: {name}: lora_{odd[1]} of expert {odd[0]} {what}; the checkpoint is not whole")
    for (e, letter), t in parts.items():
        if t.ndim != 2 or t.shape["AB".index(letter)] != r:
            raise AdapterError(
                f"{folder}: {name}: expert {e}: lora_{letter}: got shape {tuple(t.shape)}, expected rank {r}"
            )
    widths = {(parts[e, "A"].shape[1], parts[e, "B"].shape[0]) for e in range(experts)}
    if len(widths) > 1:
        raise AdapterError(f"{folder}: {name}: its experts are for linears of {sorted(widths)}, expected one")
    A, B = ([parts[e, letter] for e in range(experts)] for letter in "AB")
    return torch.cat(A), torch.cat(B, dim=1)


def _routers(folder: Path, weights: _Weights, names: Mapping[str, str], experts: int) -> dict[str, Tensor]:
    """Each layer's router, under a linear of its feed-forward block."""
    place = {n.split(".")[1]: names[n] for n in sorted(weights.experts, reverse=True)}
    odd = sorted(place.keys() ^ weights.routers.keys())
    if odd:
        has = "experts and no router" if odd[0] in place else "a router and no experts"
        raise AdapterError(f"{folder}: layer {odd[0]} has {has}, expected both; the checkpoint is not whole")
    for i, t in weights.routers.items():
        if t.ndim != 2 or t.shape[0] != experts:
            raise AdapterError(
                f"{folder}: layer {i}: the router has shape {tuple(t.shape)}, the config says num_experts={experts}"
            )
    return {f"{place[i]}.router.weight": t for i, t in weights.routers.items()}


def _mixture(
    folder: Path, config: Mapping[str, Any], experts: Mapping[str, Any], attention: Mapping[str, Any], chosen: list[str]
) -> MoloraConfig:
    """The recipe with the folder's options; plain LoRA on the rest keeps its own where ``expert_lora`` differs."""
    strategy, temperature = config.get("routing_strategy"), config.get("temperature") or 0
    if strategy in ("mixlora", "mixtral"):
        routing: dict[str, Any] = {"routing": "top_k", "top_k": config.get("top_k", 2)}
    elif strategy == "mixlora-dynamic" and temperature in (0, 1):
        routing = {"routing": "top_p", "top_p": config.get("top_p", 0.8)}
    else:
        raise AdapterError(
            f"{folder / CONFIG}: got routing_strategy={str(strategy)[:50]!r} and temperature={str(temperature)[:50]}; "
            "expected mixlora, mixtral, or mixlora-dynamic without a temperature (it divides probabilities there, "
            "which no gate here does; and mixlora-switch computes no feed-forward block at inference)"
        )
    common = {"target_modules": chosen, "released": True, "num_experts": config.get("num_experts"), **routing}
    try:
        mixture, plain = (RECIPES["mixlora"](**common, **own) for own in (experts, attention))
    except ConfigError as e:
        raise AdapterError(f"{folder}: its config is not valid: {e}") from e
    return mixture.replace(placements=(mixture.placements[0], plain.placements[1]))
