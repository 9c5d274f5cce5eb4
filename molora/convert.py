"""``convert``: a frozen model and a recipe in, the same model with a mixture of LoRA experts out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from molora.adapter.peft_lora import LoraAdapter
from molora.config import MoloraConfig
from molora.errors import ConfigError
from molora.initialisers import start_experts
from molora.model import MixtureModel, adopt
from molora.recipes import config_of
from molora.recipes.check import check
from molora.surgery.build import build
from molora.surgery.install import check_forward, install
from molora.surgery.ready_made import aligned, copy_in, on_cpu, warm_start
from molora.surgery.resolve import resolve

__all__ = ["convert", "put_on"]

M = TypeVar("M", bound=nn.Module)


@on_cpu()
def convert(model: M, recipe: str | MoloraConfig, *, seed: int = 0, **options: Any) -> M:
    """Put a mixture of LoRA experts on ``model``, in place; freezes the base and returns the same object.

    Args:
        model: any transformers model (or ``nn.Module``), on any device, in any dtype, also quantised or on meta.
        recipe: a key of ``molora.RECIPES`` with its ``options``, or a config made by ``molora.recipes.<name>(...)``.
        seed: initialises experts and routers; the same seed gives the same weights, whatever the order of modules.
        options: the recipe's own (``help(molora.recipes.mixlora)``); unknown names are refused.

    Returns:
        ``model``: still an instance of its class, usable by ``generate``, HF ``Trainer``, TRL and ``torch.compile``.

    Raises:
        ConfigError, TargetError, AdapterError: before anything is changed; after any failure the model is as before.
    """
    config = config_of(recipe, options)
    _check(model, config)
    adapters = {name: aligned(model, name, folder) for name, folder in config.adapters}
    return put_on(model, config, adapters, seed)


def put_on(model: M, config: MoloraConfig, adapters: Mapping[str, LoraAdapter], seed: int = 0) -> M:
    """:func:`convert` with the ready-made adapters at hand, by name and with this model's paths."""
    sites = resolve(model, config, adapters)
    built = build(model, config, sites, seed)
    start_experts(built.routed(), seed)
    copy_in(built, adapters)
    if config.init_from:
        warm_start(built, aligned(model, "init_from", config.init_from), config, seed)
    adopt(model, install(model, built))
    return model


def _check(model: nn.Module, config: MoloraConfig) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"convert: got a {type(model).__name__}, expected a torch module such as a transformers model"
        )
    if isinstance(model, MixtureModel):
        raise ConfigError(
            f"convert: this model already carries the recipe {model._molora.config.recipe!r}; call model.unload() first"
        )
    check(config)
    check_forward(model)
