"""The adapter_config.json of a PEFT LoRA: what it says about each module's scale, and what cannot be an expert."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.adapter.names import first_match
from molora.errors import AdapterError

__all__ = [
    "PEFT_TYPE",
    "WEIGHT",
    "check_start",
    "named_parameters",
    "refuse",
    "saved_names",
    "scale",
    "targeted_parameter",
]

PEFT_TYPE = "LORA"

# Options that change the meaning of the weights; so may any switch use_... that is not known here.
REFUSED = (
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Initialisers that subtract the start from the base weights; the adapter alone is not what was trained. From the base
# the residual of the first two is found again; the others drew at random, or used data or a quantised base.
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")
FOUND_AGAIN = ("pissa", "olora")
WEIGHT = ".weight"


def refuse(path: Path, config: Mapping[str, Any]) -> None:
    """Raise an AdapterError for a config that is not plain LoRA on linears, with the way there if there is one."""
    kind = config.get("peft_type")
    if kind != PEFT_TYPE:
        raise AdapterError(
            f"{path}: got peft_type {str(kind)[:100]!r}, expected {PEFT_TYPE!r}; if it changes the weights of linears, "
            f"{_remedy(path)}"
        )
    check_start(path, config, merges=False)
    if config.get("use_dora"):
        raise AdapterError(f"{path}: got use_dora=True, expected plain LoRA; {_remedy(path)}")
    for key in (k for k, v in config.items() if v):
        if key in REFUSED or (key.startswith("use_") and key != "use_rslora"):
            got = f"{key[:100]}={str(config[key])[:100]}"
            raise AdapterError(f"{path}: got {got}, expected plain LoRA: nothing else can be an expert")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{path}: got bias={str(config['bias'])[:100]!r}, expected 'none': an expert has no bias")
    named_parameters(path, config)


def _remedy(path: Path) -> str:
    call = f"molora.interop.to_lora.to_lora(base_model, {str(path.parent)!r}, out_folder, rank=16)"
    return f"turn it into plain LoRA first: {call}"


def check_start(path: Path, config: Mapping[str, Any], *, merges: bool) -> None:
    """Refuse a LoRA whose initialiser changed the base weights.

    ``merges``: the caller runs PEFT's initialiser on the base again, which finds PiSSA's and OLoRA's residual.

    Raises:
        AdapterError: with what to do instead.
    """
    init = config.get("init_lora_weights", True)
    if not isinstance(init, str) or not init.lower().startswith(REBASED):
        return
    got = f"{path}: got init_lora_weights={init[:100]!r}, which also changed the base weights"
    if init.lower() not in FOUND_AGAIN:
        raise AdapterError(
            f"{got} in a way that the folder does not record; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into plain LoRA"
        )
    if not merges:
        raise AdapterError(f"{got}: without them its A and B are not what was trained; {_remedy(path)}")


def _texts(path: Path, config: Mapping[str, Any], name: str) -> list[str]:
    values = config.get(name) or []
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise AdapterError(f"{path}: {name}: got {str(values)[:100]}, expected a list of names")
    return values


def saved_names(path: Path, config: Mapping[str, Any]) -> list[str]:
    """``modules_to_save``: names of modules that were trained and saved whole."""
    return _texts(path, config, "modules_to_save")


def named_parameters(path: Path, config: Mapping[str, Any]) -> list[str]:
    """``target_parameters``: name endings of parameters, of linears and of stacked experts."""
    return _texts(path, config, "target_parameters")


def targeted_parameter(config: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT reached the linear ``module`` through ``target_parameters``, by the name of its weight."""
    whole = module + WEIGHT
    return any(whole == name or whole.endswith("." + name) for name in config.get("target_parameters") or ())


def _value(path: Path, config: Mapping[str, Any], module: str, name: str, patterns: str) -> Any:
    """What the config says of ``name`` for a module: by the first pattern that fits, else for all of them."""
    named = module + WEIGHT if targeted_parameter(config, module) else module  # PEFT matches patterns so
    table = config.get(patterns) or {}
    if not isinstance(table, dict):
        raise AdapterError(f"{path}: {patterns}: got {type(table).__name__}, expected an object")
    key = first_match(table, named, f"{path}: {patterns}")
    return config.get(name, 8) if key is None else table[key]


def rank(path: Path, config: Mapping[str, Any], module: str) -> Any:
    """The rank that the config gives to a module, or a parameter by its path; of any type."""
    return _value(path, config, module, "r", "rank_pattern")


def scale(path: Path, config: Mapping[str, Any], module: str, rank_found: int) -> float:
    """alpha / r, or alpha / sqrt(r) with rank-stabilised LoRA; alpha by the first pattern that fits the module."""
    r, alpha = rank(path, config, module), _value(path, config, module, "lora_alpha", "alpha_pattern")
    if type(r) is not int or r != rank_found:
        raise AdapterError(f"{path}: {module}: got r={str(r)[:100]}, but its weights have rank {rank_found}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise AdapterError(f"{path}: {module}: got lora_alpha={str(alpha)[:100]!r}, expected a number")
    rs = config.get("use_rslora", False)
    if not isinstance(rs, bool):
        raise AdapterError(f"{path}: got use_rslora={str(rs)[:100]!r}, expected true or false")
    return alpha / (math.sqrt(rank_found) if rs else rank_found)
