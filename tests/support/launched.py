"""Launch scripts in a shell: this environment's commands first on PATH, a port of their own, no orphans; or none."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from molora.training.engine import settings as engine
from tests.support.places import ROOT

SCRIPTS = sorted(p for p in (ROOT / "training" / "launch").glob("*.sh") if p.name != "common.sh")
FOREIGN = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NUM_GPUS", "NO_SSH", "NODE_RANK")


def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment, a compiler, and no process group: arguments are read and nothing is started."""
    for name in (*FOREIGN, "CXX", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(engine, "prepare_cpu_engine", lambda: None)
    monkeypatch.setattr(engine, "_world_of_one", lambda: None)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(path: tuple[Path | str, ...] = (), **variables: str) -> dict[str, str]:
    """This one without any launcher's marks, and with ``variables``; programs are looked for in ``path`` first."""
    kept = {k: v for k, v in os.environ.items() if k not in FOREIGN and not k.startswith(("SLURM_", "ACCELERATE_"))}
    commands = os.pathsep.join(map(str, (*path, Path(sys.executable).parent, kept["PATH"])))
    return {**kept, "PATH": commands, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **variables}


def launch(
    script: str, *arguments: str, path: tuple[Path | str, ...] = (), seconds: int = 240, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script; when its time is up, end it with every process that it started."""
    env = environment(path, **variables)
    command = [str(ROOT / "training" / "launch" / script), *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)
