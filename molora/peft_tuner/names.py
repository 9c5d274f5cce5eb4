"""Which models can carry named mixtures, and what they may be called."""

from __future__ import annotations

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from molora.errors import ConfigError
from molora.layers.banks import BANKS
from molora.layers.mixture import HEAD
from molora.model import MixtureModel

__all__ = ["PLACE", "UNLOAD", "check_base", "check_name"]

PLACE = "named_mixtures"  # attribute of the base model; delete_adapter of PEFT skips paths that contain "molora_"
UNLOAD = "two in one model would feed on each other's outputs: unload() one of them first"
OWN = {PLACE, "parked", "wrappers", HEAD, "layers", "bank", "always", "router", "base_layer", "original", "trained"}
OWN |= {"weight", "bias", "select_bias"}  # parts of the keys of mixtures that are still to come


def check_base(model: nn.Module, named: bool) -> None:
    """ConfigError for a model that carries another PEFT method, or a mixture without a name (``named``: it has one)."""
    others = [type(m).__name__ for p, m in model.named_modules() if isinstance(m, BaseTunerLayer) and p != PLACE]
    if others:
        raise ConfigError(f"the model carries another PEFT method ({others[0]}); {UNLOAD}")
    if isinstance(model, MixtureModel) and not named:
        raise ConfigError("the model carries a mixture that convert() or load() put there; call unload() first")
    if nn.Linear(1, 1).weight.is_meta:
        raise ConfigError("low_cpu_mem_usage=True: a mixture is small and built beside the model; leave it out")


def check_name(model: nn.Module, name: str) -> None:
    """ConfigError for a name that PEFT would find in the keys of another mixture, or that a module cannot have."""
    keys = [path for path, _ in model.named_modules()]
    keys += [*(n for n, _ in model.named_parameters()), *(n for n, _ in model.named_buffers())]
    parts = OWN | {name for bank in BANKS.values() for name in bank.dims}
    parts |= {part for key in keys for part in key.split(".")}
    if not name or "." in name or name.isdecimal() or name in parts or hasattr(nn.ModuleDict(), name):
        raise ConfigError(
            f"adapter name: got {name!r}, expected a name without dots that is no number and no part of a path in the "
            "model or in a mixture: PEFT tells adapters apart by such parts"
        )
