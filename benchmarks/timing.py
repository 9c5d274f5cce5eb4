"""Interleaved timing in one process, and what machine it was."""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("molora", "torch", "transformers", "peft", "safetensors")


def keep_freed_memory() -> str:
    """Let the C library keep what is freed, for all that follows in this process; returns what was done.

    By default glibc hands the top of its heap back and takes it again layer by layer, whenever activations exceed a
    few MiB; on a virtual machine these page faults can cost more than the arithmetic between them. With it, both sides
    of each ratio are compared by what they compute. Serving stacks do the same with another allocator.
    """
    if platform.libc_ver()[0] != "glibc":
        return "as it is"
    library = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        library.mallopt(option, 2**30)
    return "glibc, keeping freed memory"


def interleaved(
    work: dict[str, Callable[[], Any]], rounds: int, progress: Progress, title: str
) -> dict[str, list[float]]:
    """Seconds per call, ``rounds`` of each after one that does not count.

    One call of each piece of work per round, so that a slow moment of the machine meets all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in work}
    task = progress.add_task(title, total=(rounds + 1) * len(work))
    for n in range(rounds + 1):
        for name, call in work.items():
            start = time.perf_counter()
            call()
            if n:
                seconds[name].append(time.perf_counter() - start)
            progress.advance(task)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, peer: str) -> float:
    """Median over rounds of one's time over the peer's in the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[peer], strict=True))


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return done.stdout.strip() or "not a git checkout"


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and commit, as they go into a result file."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "python": platform.python_version(),
        "versions": versions,
        "commit": _commit(),
    }
