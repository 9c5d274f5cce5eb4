"""The activations of gated linear units, ``act(u) * v``, that the kernels know."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ACTIVATIONS", "activate"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")


def activate(act: str, u: Tensor, inplace: bool = False) -> Tensor:
    """``act(u)``, of one in ``ACTIVATIONS``; into u with ``inplace``, where PyTorch can."""
    if act == "silu":
        return F.silu(u, inplace)
    return F.relu(u, inplace) if act == "relu" else F.gelu(u, approximate="tanh" if act == "gelu_tanh" else "none")
