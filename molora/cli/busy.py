"""Fewer threads where others keep cores busy, at the start of a command that computes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console

__all__ = ["spare_busy_cores"]

# Whoever sets one of these has decided: the user, or a launcher of several processes.
OWN_SETTINGS = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "WORLD_SIZE",
)  # fmt: skip
STAT = Path("/proc/stat")
LOOK_S = 0.5  # how long the cores are watched
IDLE = slice(3, 5)  # of a core's times in /proc/stat: idle, iowait
QUIET = 0.3  # of a core: less is the machine's own housekeeping


def spare_busy_cores(console: Console) -> None:
    """Take as many threads as there are free cores, and say so, if a core of this process is busy.

    PyTorch starts one thread a core, and they wait for each other by spinning. With one core taken by somebody else,
    the late thread holds up all others, and a training step was seen to take 13 to 40 times as long.

    Nothing changes on a quiet machine, or if the environment says how many threads to take or how they wait.
    """
    if any(name in os.environ for name in OWN_SETTINGS):
        return
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    busy = busy_cores(cores)
    free = max(1, len(cores) - math.ceil(busy - QUIET))
    if free >= torch.get_num_threads():
        return
    torch.set_num_threads(free)
    os.environ["OMP_NUM_THREADS"] = str(free)  # for the processes that this one starts
    threads = "1 thread" if free == 1 else f"{free} threads"
    console.print(
        f"busy machine: others use {busy:.1f} of {len(cores)} cores, so this takes {threads}; "
        "set OMP_NUM_THREADS for another number",
        highlight=False,
        soft_wrap=True,
    )


def busy_cores(cores: Iterable[int]) -> float:
    """How many of ``cores`` others keep busy: watched for half a second, or the load average where that is unknown.

    The load average alone is a minute late: it still counts the command that has just ended.
    """
    before = _times(cores)
    if not before:
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    time.sleep(LOOK_S)
    after = _times(cores)
    busy = 0.0
    for core in before.keys() & after.keys():
        spent = [b - a for a, b in zip(before[core], after[core], strict=True)]
        if sum(spent) > 0:
            busy += 1 - sum(spent[IDLE]) / sum(spent)
    return busy


def _times(cores: Iterable[int]) -> dict[int, list[int]]:
    """Each core's times since the machine started, in the order of /proc/stat, without those of guests."""
    if not STAT.exists():
        return {}
    lines = (line.split() for line in STAT.read_text(encoding="ascii").splitlines())
    times = {name: [int(t) for t in rest[:8]] for name, *rest in lines}
    return {core: times[f"cpu{core}"] for core in cores if f"cpu{core}" in times}
