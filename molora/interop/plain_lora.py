"""Which adapter folders of PEFT are plain LoRA, ``W + s B A`` on the base as it is, and the way there for others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from molora.errors import AdapterError

__all__ = ["PEFT_TYPE", "check_plain", "check_start"]

PEFT_TYPE = "LORA"
# Options that change the meaning of the weights; so may any switch use_... that is not known here.
REFUSED = (
    "lora_bias",
    "target_parameters",
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


def check_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse whatever A and B and a scale do not say; ``path`` is the config's, for messages.

    Raises:
        AdapterError: naming the option, and the way to plain LoRA where there is one.
    """
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
    if config.get("modules_to_save"):
        raise AdapterError(
            f"{path}: got modules_to_save={str(config['modules_to_save'])[:100]}, expected none: whole trained modules "
            "cannot be mixed; train them with molora's own modules_to_save"
        )


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
