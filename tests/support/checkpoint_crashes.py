"""A Trainer that is killed while it saves, as a program: ``python -m tests.support.checkpoint_crashes FOLDER KILLS``.

It forks the trainers, since nearly all of starting one is imports; forking needs a process without threads of its own.
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

from molora.errors import CheckpointError
from molora.training import checkpoints, find_newest
from tests.support.crashes import in_child
from tests.support.training_runs import build, run, trainer

SETTINGS: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}


@contextlib.contextmanager
def at_step(number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """``act`` before the ``number``-th write, fsync or rename from now on; the list tells what they were."""
    kinds: list[str] = []

    def before(kind: str) -> None:
        kinds.append(kind)
        if len(kinds) == number:
            act()

    def watched(kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            before(kind)
            return real(*args, **kwargs)

        return call

    class Writer(io.TextIOWrapper):
        def write(self, text: str) -> int:
            half = super().write(text[: len(text) // 2])
            self.flush()
            before("write")
            return half + super().write(text[len(text) // 2 :])

    def opened(path: Any, mode: str = "r", **kwargs: Any) -> Any:
        return Writer(io.FileIO(path, "w"), **kwargs) if mode == "w" else open(path, mode, **kwargs)

    def saved(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            Path(path).write_bytes(b"half of a file")
            before("write")
            real(value, path, *args, **kwargs)

        return call

    real_save = torch.save
    with contextlib.ExitStack() as undo:
        for kind in ("fsync", "replace"):
            undo.callback(setattr, os, kind, getattr(os, kind))
            setattr(os, kind, watched(kind, getattr(os, kind)))
        undo.callback(setattr, torch, "save", real_save)
        torch.save = saved(real_save)
        undo.callback(delattr, checkpoints, "open")
        checkpoints.open = opened  # type: ignore[attr-defined]
        yield kinds


def newest(folder: Path) -> int:
    """The step of the newest whole checkpoint, which trains on; 0 when there is none yet."""
    step = last_step(folder)
    if step == 0:
        return 0
    it = run(build("mixlora"), folder, resume=True, **SETTINGS, max_steps=step + 1)
    assert it.state.global_step == step + 1
    assert {p.name for p in folder.glob(".checkpoint-*")} == set(), "a killed save left something behind for ever"
    return step


def die_at_every_step(folder: Path) -> None:
    """Kill the save of step 2 before each of its writes, fsyncs and renames: then step 1 is the newest, or step 2."""
    run(build("mixlora"), folder / "start", **SETTINGS, max_steps=1)
    with at_step(0, lambda: None) as kinds:
        second(folder / "start", folder / "count")
    assert {"write", "fsync", "replace"} <= set(kinds), kinds
    seen = set()
    for n in range(1, len(kinds) + 1):
        place = folder / f"{n}"

        def saving(n: int = n, place: Path = place) -> None:
            with at_step(n, lambda: os.kill(os.getpid(), signal.SIGKILL)):
                second(folder / "start", place)

        _, status = os.waitpid(in_child(saving), 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, (n, kinds[n - 1], status)
        seen.add(newest(place))
    assert seen == {1, 2}, seen


def second(start: Path, place: Path) -> None:
    """Go on from a copy of ``start`` for the second step."""
    import shutil

    shutil.copytree(start, place)
    run(build("mixlora"), place, resume=True, **SETTINGS, max_steps=2)


def kill_at_random(folder: Path, count: int) -> None:
    """SIGKILL a Trainer that saves at every step, at random moments, and let the next go on."""
    reached = 0
    for seed in range(count):
        child = in_child(lambda: run(build("mixlora"), folder, resume="auto", **SETTINGS, max_steps=10**6))
        end = time.monotonic() + 60
        while last_step(folder) <= reached and time.monotonic() < end:  # it has started, and saves
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0.0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        find_newest(folder)  # raises when there is none that is whole
        assert last_step(folder) > reached, f"stayed at step {reached}"
        reached = last_step(folder)
    newest(folder)


def last_step(folder: Path) -> int:
    """The step of the newest checkpoint that is whole."""
    found = find_newest(folder)
    return 0 if found is None else int(found.name.rpartition("-")[2])


def full_disk(folder: Path) -> None:
    """A disk that is full at any of the writes: one clear error, the earlier checkpoint whole, nothing left behind."""
    import errno

    run(build("mixlora"), folder / "start", **SETTINGS, max_steps=1)
    with at_step(0, lambda: None) as kinds:
        second(folder / "start", folder / "count")

    def no_space() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for n in range(1, len(kinds) + 1):
        place = folder / f"{n}"
        try:
            with at_step(n, no_space):
                second(folder / "start", place)
        except CheckpointError as e:
            said = str(e)
        else:
            said = "nothing"
        wanted = "checkpoint-2: the checkpoint could not be saved", "earlier ones are unharmed"
        assert all(w in said for w in wanted), f"{kinds[n - 1]} number {n} failed and the user was told: {said}"
        assert newest(place) in (1, 2)


def main(where: Path, kills: int) -> dict[str, str]:
    """Every mode; what went wrong by mode, empty when nothing did."""
    modes: dict[str, Callable[[], None]] = {
        "every step": lambda: die_at_every_step(where / "every"),
        "random": lambda: kill_at_random(where / "random", kills),
        "full disk": lambda: full_disk(where / "full"),
    }
    faults = dict.fromkeys(modes, "")
    for mode, act in modes.items():
        try:
            act()
        except BaseException:
            faults[mode] = traceback.format_exc()
    return faults


if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer(build("mixlora"), Path(sys.argv[1]) / "warm")  # imports and builds what all of them need, before forking
    faults = main(Path(sys.argv[1]), int(sys.argv[2]))
    (Path(sys.argv[1]) / "faults.json").write_text(json.dumps(faults))
