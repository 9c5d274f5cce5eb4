"""Saves that die: every step of a save is numbered, and one of them kills the process or fails.

Run as a program (``python -m tests.support.crashes FOLDER KILLS``) it forks writers, kills them and reads what is left;
forking needs a process of its own, since torch and pytest have threads.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from molora.adapter import atomic_save as staged
from molora.errors import AdapterError
from tests.support.folders import load, save, small_tensors

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}


@contextlib.contextmanager
def steps(on_step: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``on_step(kind, argument)`` before every write, fsync, rename and removal of a save."""

    class Writer(io.BufferedWriter):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            half = super().write(view[: len(view) // 2])
            self.flush()
            on_step("write", self.fileno())
            return half + super().write(view[len(view) // 2 :])

    def before(kind: str) -> None:
        real = getattr(os, kind)

        def call(*args: Any) -> Any:
            on_step(kind, args[0])
            return real(*args)

        undo.callback(setattr, os, kind, real)
        setattr(os, kind, call)

    def writer(descriptor: int, mode: str) -> Writer:
        return Writer(io.FileIO(descriptor, mode))

    with contextlib.ExitStack() as undo:
        for kind in ("fsync", "replace", "unlink"):
            before(kind)
        undo.callback(delattr, staged, "open")
        staged.open = writer  # type: ignore[attr-defined]
        yield


@contextlib.contextmanager
def at_step(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """``act`` before step ``number``; the list counts the steps."""
    count = [0]

    def on_step(kind: str, argument: Any) -> None:
        count[0] += 1
        if count[0] == number:
            act()

    with steps(on_step):
        yield count


def number_of_steps(folder: Path) -> int:
    """How many steps a save over an older adapter takes."""
    save(folder, small_tensors(0.0))
    with at_step(0, lambda: None) as count:
        save(folder, small_tensors(1.0))
    return count[0]


def value(folder: Path) -> float:
    """The one value that all tensors of the folder hold; an error for a mixture."""
    values = {v for t in load(folder).values() for v in t.flatten().tolist()}
    assert len(values) == 1, f"a mixture of {sorted(values)}"
    return values.pop()


def in_child(act: Callable[[], object]) -> int:
    """Fork a process that does ``act`` and ends; its id."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def check_after(folder: Path, allowed: set[float], new: bool = False) -> float:
    """What is left is one adapter of the ``allowed``; the next save works and leaves nothing else."""
    if new and not (folder / "adapter_model.safetensors").exists():
        left = -1.0
    else:
        left = value(folder)
        assert left in allowed, f"got {left}, expected one of {allowed}"
    save(folder, small_tensors(9.0))
    assert value(folder) == 9.0
    assert {p.name for p in folder.iterdir()} == FILES
    return left


def die_at_every_step(folder: Path, new: bool) -> None:
    """Kill a save before each of its steps, over an older adapter or in a new folder; both outcomes must occur."""
    total = number_of_steps(folder / "count")
    seen = set()
    for n in range(1, total + 1):
        place = folder / f"{n}"
        if not new:
            save(place, small_tensors(1.0))

        def saving(n: int = n, place: Path = place) -> None:
            with at_step(n, lambda: os._exit(9)):
                save(place, small_tensors(2.0))

        _, status = os.waitpid(in_child(saving), 0)
        assert os.waitstatus_to_exitcode(status) in ((9,) if not new or n < total else (0, 9)), (n, status)
        seen.add(check_after(place, {1.0, 2.0}, new))
    assert seen == ({-1.0, 2.0} if new else {1.0, 2.0})


def kill_at_random(folder: Path, count: int) -> None:
    """SIGKILL a process that saves all the time, at random moments."""
    save(folder, small_tensors(0.0))

    def saving() -> None:
        for i in range(10**6):
            save(folder, small_tensors(float(i)))

    for seed in range(count):
        child = in_child(saving)
        time.sleep(random.Random(seed).uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        value(folder)
    check_after(folder, {value(folder)})


def read_while_saving(folder: Path, seconds: float) -> None:
    """Two writers save all the time; every read sees one whole adapter, and many different ones."""
    save(folder, small_tensors(0.0))

    def saving(step: int) -> None:
        for i in range(10**6):
            save(folder, small_tensors(float(step * i)))

    children = [in_child(lambda step=step: saving(step)) for step in (1, -1)]  # type: ignore[misc]
    try:
        end, seen, busy = time.monotonic() + seconds, set(), 0
        while time.monotonic() < end:
            try:
                seen.add(value(folder))
            except AdapterError as e:
                if "all the time" not in str(e):
                    raise
                busy += 1
        assert len(seen) > 5, f"only {len(seen)} different adapters seen; {busy} times too busy"
        assert min(seen) < 0 < max(seen), "one of the writers never had its turn"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def main(where: Path, kills: int) -> dict[str, str]:
    """Every mode, one after another in this process; what went wrong by mode, empty when nothing did."""
    modes: dict[str, Callable[[], None]] = {
        "old": lambda: die_at_every_step(where / "old", new=False),
        "new": lambda: die_at_every_step(where / "new", new=True),
        "kill": lambda: kill_at_random(where / "kill", kills),
        "read": lambda: read_while_saving(where / "read", 1.5),
    }
    faults = dict.fromkeys(modes, "")
    for mode, run in modes.items():
        try:
            run()
        except Exception:
            faults[mode] = traceback.format_exc()
    return faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
