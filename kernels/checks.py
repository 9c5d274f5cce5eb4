"""What the functions of tensors ask of their arguments, and the dtype that they compute in."""

from __future__ import annotations

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.routing import autocast_on

__all__ = ["expect", "lowered"]


def lowered(x: Tensor) -> Tensor:
    """x in the dtype that autocast takes products in; custom operators are not cast by themselves."""
    if not autocast_on(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def expect(what: str, name: str, got: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuse an argument ``name`` of the function ``what`` that has another shape, or lies elsewhere than x.

    Raises:
        ConfigError: with both shapes, or both devices.
    """
    if tuple(got.shape) != shape:
        raise ConfigError(f"{what}: got {name} of shape {tuple(got.shape)}, expected {shape}")
    if got.device != device:
        raise ConfigError(f"{what}: got {name} on {got.device}, expected {device}, where x is; move it there")
