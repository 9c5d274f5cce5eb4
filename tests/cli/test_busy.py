"""A command that computes leaves busy cores alone, unless somebody has decided otherwise."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from molora.cli import busy

CORES = 8


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of eight cores whose user has set nothing."""
    for name in busy.OWN_SETTINGS:
        monkeypatch.setenv(name, "")  # so that what is set below goes afterwards, too
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(CORES)
    yield
    torch.set_num_threads(threads)


def said() -> str:
    console = Console(file=io.StringIO(), width=60)
    busy.spare_busy_cores(console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("others", "threads"), [(0.0, 8), (0.2, 8), (0.6, 7), (1.0, 7), (2.5, 5), (7.9, 1), (8.0, 1), (40.0, 1)]
)
def test_threads_are_as_many_as_free_cores(others: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "busy_cores", lambda _: others)
    text = said()
    assert torch.get_num_threads() == threads
    assert os.environ.get("OMP_NUM_THREADS") == (None if threads == CORES else str(threads)), "for child processes"
    if threads == CORES:
        assert not text
    else:
        assert text.startswith(f"busy machine: others use {others:.1f} of 8 cores, so this takes {threads} thread")
        assert len(text.splitlines()) == 1


@pytest.mark.parametrize("name", busy.OWN_SETTINGS)
def test_the_users_own_setting_wins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "busy_cores", lambda _: 7.0)
    monkeypatch.setenv(name, "8")
    assert said() == ""
    assert torch.get_num_threads() == CORES


def test_fewer_threads_than_free_cores_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(busy, "busy_cores", lambda _: 3.0)
    torch.set_num_threads(2)
    assert said() == ""
    assert torch.get_num_threads() == 2


def test_the_load_average_is_asked_where_the_cores_cannot_be_watched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(busy, "STAT", tmp_path / "none")
    monkeypatch.setattr(os, "getloadavg", lambda: (3.0, 0.0, 0.0), raising=False)
    assert "others use 3.0 of 8 cores" in said()


def test_only_cores_of_this_process_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two looks at four cores: core 1 works half of the time, core 3 all of it, and this process may not use core 3."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(busy, "STAT", stat)

    def write(ticks: int) -> None:
        cores = [(0, ticks), (ticks // 2, ticks // 2), (0, ticks), (ticks, 0)]
        lines = [f"cpu{i} {used} 0 0 {idle} 0 0 0 0 9 9" for i, (used, idle) in enumerate(cores)]
        stat.write_text("\n".join(["cpu 1 1 1 1 1 1 1 1 1 1", *lines, "intr 5 5"]) + "\n")

    write(100)
    monkeypatch.setattr(time, "sleep", lambda _: write(200))
    assert busy.busy_cores({0, 1, 2}) == 0.5
    write(100)
    assert busy.busy_cores({1, 3}) == 1.5


def test_a_core_that_is_kept_busy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real figures of this machine, with one process that computes for as long as they are taken."""
    if not busy.STAT.exists():
        pytest.skip("needs /proc/stat")
    monkeypatch.undo()
    cores = os.sched_getaffinity(0)
    monkeypatch.setattr(busy, "LOOK_S", 1.0)
    worker = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.5)  # it starts
        assert busy.busy_cores(cores) > 0.4
    finally:
        worker.kill()
        worker.wait(60)
