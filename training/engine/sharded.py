"""What differs where DeepSpeed holds the parameters: reading them whole, and its own part of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora import processes
from molora.surgery.state import saved_tensors

__all__ = ["adapter_state", "load_engine", "save_engine", "stage"]


def stage(engine: Any) -> int:
    """The ZeRO stage of a DeepSpeed engine."""
    return int(engine.zero_optimization_stage())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors, whole, on the CPU, under the names of ``model.state_dict()``; a collective.

    Parameters that the engine keeps in half precision are read from its float32 master copy.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state = model.state_dict(keep_vars=True)
    wanted = {id(t) for t in saved_tensors(model, state).values()}
    out = {}
    for name, t in state.items():
        if id(t) not in wanted:
            continue
        with processes.whole(t):
            whole = t.detach().to("cpu", copy=True)
        if t.requires_grad and t.dtype in (torch.float16, torch.bfloat16):
            master = safe_get_full_fp32_param(t)
            whole = whole if master is None else master.detach().to("cpu", copy=True)
        out[name] = whole
    return out


def save_engine(engine: Any, folder: Path | str) -> None:
    """DeepSpeed's shards without the frozen base; its universal format can be made of them for all stages."""
    from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO, UNIVERSAL_CHECKPOINT_VERSION_KEY
    from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_VERSION_VALUE as VERSION

    client = {UNIVERSAL_CHECKPOINT_INFO: {UNIVERSAL_CHECKPOINT_VERSION_KEY: VERSION}}
    engine.save_checkpoint(str(folder), client_state=client, exclude_frozen_parameters=True)


def load_engine(engine: Any, folder: Path | str) -> None:
    """Weights, optimizer and schedule from DeepSpeed's shards; the frozen base is not in them, so not strict."""
    path, _ = engine.load_checkpoint(
        str(folder), load_module_strict=False, load_optimizer_states=True, load_lr_scheduler_states=True
    )
    if path is None:
        from molora.errors import CheckpointError

        raise CheckpointError(f"{folder}: DeepSpeed found no checkpoint in it; was it saved by another engine?")
