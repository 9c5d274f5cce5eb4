"""Foreign weights in a pickle: never without being asked, and then tensors only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from molora.adapter.safetensors_file import DTYPES
from molora.adapter.strict_json import open_regular
from molora.errors import AdapterError

__all__ = ["load_pickle"]


def load_pickle(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The named tensors of a ``torch.save`` file, read with ``weights_only=True``, on the CPU.

    Raises:
        FileNotFoundError: when the file is missing.
        AdapterError: without ``allow_pickle``; for anything but named finite tensors.
    """
    with open(open_regular(path), "rb") as file:
        if not allow_pickle:
            raise AdapterError(
                f"{path}: got a pickle, expected a safetensors file; convert it (load it with what made it, then "
                "save_pretrained), or pass allow_pickle=True if you trust where it comes from"
            )
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as e:  # torch raises many types for damaged files and for refused pickles
            raise AdapterError(
                f"{path}: got {type(e).__name__}: {str(e)[:200]}; expected a torch.save file with plain tensors"
            ) from e
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise AdapterError(f"{path}: got a {type(state).__name__}, expected named tensors and nothing else")
    for name, t in state.items():
        if not _is_plain(t):
            got = f"{t.dtype} ({t.layout}, {t.device})"
            raise AdapterError(
                f"{path}: {name[:200]}: got {got}, expected a dense tensor with all its numbers in the file"
            )
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise AdapterError(f"{path}: {name[:200]} holds NaN or infinite values, expected finite weights")
    return {name: t.detach() for name, t in state.items()}


def _is_plain(t: Tensor) -> bool:
    """Whether the file holds every number of ``t``: strides can claim terabytes that one stored number stands for."""
    dense = t.layout is torch.strided and not t.is_nested and t.device.type == "cpu" and t.dtype in DTYPES.values()
    return dense and t.numel() * t.element_size() <= t.untyped_storage().nbytes()
