"""Foreign weights in a pickle: never without being asked, and then tensors only."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from molora.errors import AdapterError
from molora.strict_json import open_regular

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
    bad = [k for k, v in state.items() if v.is_floating_point() and not bool(v.isfinite().all())]
    if bad:
        raise AdapterError(f"{path}: {bad[0][:200]} holds NaN or infinite values, expected finite weights")
    return state
