"""Tests of Triton kernels, each set in a process of its own: compiled on a CUDA device, else in Triton's interpreter.

The interpreter is switched on by the environment before Triton is imported, hence the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.support.places import ROOT

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from molora.kernels.tiles import TILES

FILES = sorted(p.name for p in (ROOT / "tests" / "kernels" / "interpreted").glob("test_*.py"))
LIMIT_S = 280  # below pytest's own limit for a test, so that the reason is seen


def run(*arguments: str, **environment: str) -> str:
    """The closing line of a pytest process; fails with the end of what it printed."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    env = {"OMP_NUM_THREADS": "1", **os.environ, **interpret, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout.rstrip().splitlines()[-1]


@pytest.fixture(scope="session")
def wide_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles that hold all rows of the tiny model at once: the interpreter takes time by programs, not by size."""
    wide = {k: t._replace(rows=64) for k, t in TILES.items() if k[0] in ("contract", "expand") and k[3] == 4}
    path = tmp_path_factory.mktemp("tiles") / "tiles.json"
    path.write_text(json.dumps({"tiles": [[list(k), list(t)] for k, t in wide.items()]}))
    return path


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels(file: str, wide_tiles: Path):
    """Whole models take the wide tiles; the kernels' own tests the tiles that are shipped."""
    tiles = {"MOLORA_TILES": str(wide_tiles)} if file == "test_sites.py" and not torch.cuda.is_available() else {}
    assert "passed" in run(f"tests/kernels/interpreted/{file}", **tiles)
