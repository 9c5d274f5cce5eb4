"""A save that is killed, fails or is read meanwhile leaves the old adapter or the new one, and nothing in between."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from molora.errors import CheckpointError
from tests.support import crashes
from tests.support.crashes import FILES, at_step, check_after, number_of_steps, steps, value
from tests.support.folders import contents, save, small_tensors
from tests.support.places import ROOT


def program(folder: Path, kills: int) -> dict[str, str]:
    """What went wrong in each mode of tests/support/crashes.py."""
    command = [sys.executable, "-m", "tests.support.crashes", str(folder), str(kills)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return program(tmp_path_factory.mktemp("crashes"), kills=5)


@pytest.mark.parametrize("mode", ["old", "new", "kill"])
def test_a_killed_save_leaves_a_whole_adapter(mode: str, faults: dict[str, str]):
    assert faults[mode] == ""


def test_a_reader_beside_two_writers_sees_whole_adapters(faults: dict[str, str]):
    assert faults["read"] == ""


@pytest.mark.slow
def test_a_save_killed_at_many_moments_leaves_a_whole_adapter(tmp_path: Path):
    assert set(program(tmp_path, kills=60).values()) == {""}


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("fail", "error"), [(no_space, CheckpointError), (interrupt, KeyboardInterrupt)])
def test_an_error_at_any_step_leaves_a_whole_adapter(fail: Callable[[], None], error: Any, tmp_path: Path):
    total = number_of_steps(tmp_path / "count")
    seen = set()
    for n in range(1, total + 1):
        folder = tmp_path / str(n)
        save(folder, small_tensors(1.0))
        said = None
        try:
            with at_step(n, fail):
                save(folder, small_tensors(2.0))
        except error as e:
            said = str(e)
        if said is None:
            assert n > total - len(FILES), "only the removal of a temporary file after the save may go unreported"
        elif error is CheckpointError:
            assert f"{folder}: could not be saved" in said
        seen.add(check_after(folder, {1.0, 2.0}))
    assert seen == {1.0, 2.0}


def interrupted(folder: Path, new: float, step: int) -> bool:
    """Save ``new`` with an interrupt before ``step``; whether the save came so far."""
    try:
        with at_step(step, interrupt):
            save(folder, small_tensors(new))
    except KeyboardInterrupt:
        return True
    return False


def test_a_second_save_that_dies_finds_what_the_first_one_left(tmp_path: Path):
    for step in range(1, number_of_steps(tmp_path / "count")):
        half = tmp_path / "half"
        shutil.rmtree(half, ignore_errors=True)
        save(half, small_tensors(1.0))
        interrupted(half, 2.0, step)
        if (half / crashes.staged.NEXT).exists() and value(half) == 2.0:
            break
    else:
        pytest.fail("no step leaves new weights beside the old config")
    step, seen = 1, set()
    while interrupted(shutil.copytree(half, tmp_path / f"{step}"), 3.0, step):
        seen.add(check_after(tmp_path / f"{step}", {2.0, 3.0}))
        step += 1
    assert seen == {2.0, 3.0}


def test_what_is_renamed_is_on_the_disk_before_and_known_there_after(tmp_path: Path):
    """No kill can show a missing fsync, only a power cut can; so the order of the steps is checked."""
    save(tmp_path, small_tensors(1.0))
    log: list[tuple[str, Any]] = []

    def on_step(kind: str, argument: Any) -> None:
        if kind == "fsync":
            is_folder = stat.S_ISDIR(os.fstat(argument).st_mode)
            log.append(("folder on disk" if is_folder else "file on disk", os.fstat(argument).st_ino))
        elif kind == "replace":
            log.append(("replace", os.stat(argument).st_ino))

    with steps(on_step):
        save(tmp_path, small_tensors(2.0))
    for i, (kind, inode) in enumerate(log):
        if kind == "replace":
            assert ("file on disk", inode) in log[:i]
    named = {(tmp_path / name).stat().st_ino: name for name in FILES}
    short = [kind if kind != "replace" else named[inode] for kind, inode in log if kind != "file on disk"]
    assert short == [
        "adapter_config.json",  # under its temporary name
        "folder on disk",
        "adapter_model.safetensors",
        "folder on disk",
        "adapter_config.json",
        "README.md",
        "folder on disk",
    ]


@pytest.mark.parametrize("room", [0, 1, 100, 700, 1200])
def test_a_disk_that_is_full_after_some_bytes(room: int, tmp_path: Path):
    """The kernel itself refuses the write: a limit on the size of files stands in for the disk."""
    before = contents(save(tmp_path, small_tensors(1.0)))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            save(tmp_path, small_tensors(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(tmp_path) == before
    check_after(tmp_path, {1.0})


def test_a_folder_without_write_permission():
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: another user could not enter it
        folder = Path(name)
        before = contents(save(folder, small_tensors(1.0)))
        root, mode = os.geteuid() == 0, stat.S_IMODE(folder.stat().st_mode)
        folder.chmod(0o555)
        if root:
            os.seteuid(65534)  # permissions mean nothing to root
        try:
            with pytest.raises(CheckpointError, match="Permission denied"):
                save(folder, small_tensors(2.0))
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(mode)
        assert contents(folder) == before


@pytest.mark.parametrize("where", ["file", "file/below", "dangling"])
def test_a_path_that_cannot_be_a_folder(where: str, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    with pytest.raises(CheckpointError, match="could not be saved"):
        save(tmp_path / where)
    assert (tmp_path / "file").read_text() == "x"


def test_leftovers_of_a_killed_save_go_with_the_next(tmp_path: Path):
    save(tmp_path, small_tensors(1.0))
    for name in FILES:
        (tmp_path / crashes.staged.TEMPORARY.format(name)).write_bytes(b"half")
    (tmp_path / crashes.staged.NEXT).write_bytes(b"{")
    assert value(tmp_path) == 1.0
    save(tmp_path, small_tensors(2.0))
    assert contents(tmp_path).keys() == FILES
    assert value(tmp_path) == 2.0
