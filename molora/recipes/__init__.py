"""The methods. Each recipe is a function of options that returns a :class:`molora.config.MoloraConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from molora.config import MoloraConfig
from molora.errors import ConfigError, nearest
from molora.recipes.llava_mole import llava_mole
from molora.recipes.lora import lora
from molora.recipes.meteora import meteora
from molora.recipes.mixlora import mixlora
from molora.recipes.mola import mola
from molora.recipes.smora import smora
from molora.recipes.xlora import xlora

__all__ = ["RECIPES", "config_of", "llava_mole", "lora", "meteora", "mixlora", "mola", "smora", "xlora"]

RECIPES: dict[str, Callable[..., MoloraConfig]] = {
    "lora": lora,
    "mixlora": mixlora,
    "mola": mola,
    "smora": smora,
    "llava_mole": llava_mole,
    "xlora": xlora,
    "meteora": meteora,
}


def config_of(recipe: str | MoloraConfig, options: Mapping[str, Any]) -> MoloraConfig:
    """The config of a recipe with its options, or the given one.

    Raises:
        ConfigError: for an unknown recipe, options that it refuses, and a config with options.
    """
    if isinstance(recipe, MoloraConfig):
        if options:
            raise ConfigError(f"convert: got a config and the options {list(options)}; give them to the recipe instead")
        return recipe
    if recipe not in RECIPES:
        raise ConfigError(
            f"recipe: got {recipe!r}, expected one of {', '.join(RECIPES)}{nearest(str(recipe), RECIPES)}"
        )
    return RECIPES[recipe](**options)
