"""What the processes of one training run agree on. In a single process each of these costs nothing.

Every process has to call them, in the same order: they are collectives.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, distributed

__all__ = ["anywhere", "count", "leave", "total", "whole"]


def count() -> int:
    """How many processes train together; 1 where torch.distributed was not started."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def total(t: Tensor) -> Tensor:
    """The sum of ``t`` over all processes, without gradient; ``t`` itself in a single one."""
    if count() == 1:
        return t
    out = t.detach().clone()
    distributed.all_reduce(out)
    return out


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether ``flag`` holds in any process; ``device``: one that the backend can reduce on."""
    if count() == 1:
        return flag
    return bool(total(torch.tensor(float(flag), device=device)) > 0)


@contextlib.contextmanager
def whole(t: Any, write: bool = False) -> Iterator[None]:
    """Within the block, a parameter that ZeRO-3 partitioned is whole; ``write``: what process 0 puts there stays."""
    if not hasattr(t, "ds_id") or (t.ds_active_sub_modules and not write):  # no pieces, or a module holds it whole now
        yield
        return
    from deepspeed import zero

    with zero.GatheredParameters([t], modifier_rank=0 if write else None):
        yield


def leave() -> None:
    """Leave the process group, if there is one, when all processes are done."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
