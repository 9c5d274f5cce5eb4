"""Which kernel computes the sum: one table, and a deterministic choice by shapes and device with its reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from molora.errors import ConfigError, nearest
from molora.kernels import reference

__all__ = ["KERNELS", "Choice", "choose", "rank_mix"]

KERNELS: dict[str, Callable[..., Tensor]] = {
    "concat": reference.rank_mix_concat,
    "loop": reference.rank_mix_loop,
}


class Choice(NamedTuple):
    """The name of a kernel and why it was taken."""

    name: str
    reason: str


def choose(kernel: str, total_rank: int, device_type: str) -> Choice:
    """Pick a kernel for a bank of ``total_rank`` ranks on ``device_type``; ``kernel`` other than ``"auto"`` is obeyed.

    Raises:
        ConfigError: for a name that is not in ``KERNELS``.
    """
    if kernel == "auto":
        return Choice("concat", f"the default: {total_rank} ranks side by side on {device_type}")
    if kernel not in KERNELS:
        raise ConfigError(
            f"kernel: got {kernel!r}, expected 'auto' or one of {', '.join(KERNELS)}{nearest(kernel, KERNELS)}"
        )
    return Choice(kernel, "asked for by kernel=")


def rank_mix(
    kernel: str,
    base_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights_TE: Tensor | None,
    layout: reference.Layout,
) -> Tensor:
    """``base + ((x A^T) * g) B^T`` by the chosen kernel; see :func:`molora.kernels.reference.rank_mix_loop`."""
    name = choose(kernel, A_RI.shape[0], x_TI.device.type).name
    return KERNELS[name](base_TO, x_TI, A_RI, B_OR, weights_TE, layout)
