"""Tests of Triton kernels, each set in a process of its own: compiled on a CUDA device, else in Triton's interpreter.

The interpreter is switched on by the environment before Triton is imported, hence the processes.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.support.places import ROOT

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

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


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels(file: str):
    assert "passed" in run(f"tests/kernels/interpreted/{file}")
