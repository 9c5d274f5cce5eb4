"""The former place of :mod:`molora.initialisers.lora_ga`."""

from molora.initialisers.lora_ga import *  # noqa: F403
