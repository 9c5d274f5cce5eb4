"""The methods. Each recipe is a function of options that returns a :class:`molora.config.MoloraConfig`."""

from __future__ import annotations

from collections.abc import Callable

from molora.config import MoloraConfig
from molora.recipes.llava_mole import llava_mole
from molora.recipes.lora import lora
from molora.recipes.meteora import meteora
from molora.recipes.mixlora import mixlora
from molora.recipes.mola import mola
from molora.recipes.smora import smora
from molora.recipes.xlora import xlora

__all__ = ["RECIPES", "llava_mole", "lora", "meteora", "mixlora", "mola", "smora", "xlora"]

RECIPES: dict[str, Callable[..., MoloraConfig]] = {
    "lora": lora,
    "mixlora": mixlora,
    "mola": mola,
    "smora": smora,
    "llava_mole": llava_mole,
    "xlora": xlora,
    "meteora": meteora,
}
