"""Tests of Triton kernels, each set in a process of its own: compiled on a CUDA device, else in Triton's interpreter.

The interpreter is switched on by the environment before Triton is imported, hence the processes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(p.name for p in (ROOT / "tests" / "interpreted").glob("test_*.py"))
# Cells of the behaviour matrix, over all recipes on the tiny Llama, with every site on the Triton kernels.
CELLS = {
    "identity": ["test_conversion.py::test_zero_init_is_identity"],
    "oracle": ["test_formulas.py", "test_formulas_blocks.py", "test_formulas_two_pass.py"],
    "gradients": ["test_training_steps.py::test_every_trainable_parameter_gets_a_gradient"],
    "padding": ["test_invariances.py::test_padding_on_either_side_is_no_padding"],
    "checkpointing": ["test_checkpointing.py::test_same_loss_and_gradients"],
}
LIMIT_S = 280  # below pytest's own limit for a test, so that the reason is seen


def run(*arguments: str, **environment: str) -> str:
    """The closing line of a pytest process; fails with the end of what it printed."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **interpret, **environment}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    return done.stdout.rstrip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_kernels(file: str):
    assert "passed" in run(f"tests/interpreted/{file}")


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_behaviour_matrix_on_triton(cell: str):
    only = [] if cell == "oracle" else ["-k", "llama and not fp16 and not bf16"]
    said = run(*(f"tests/{t}" for t in CELLS[cell]), *only, MOLORA_TEST_KERNEL="triton")
    assert "passed" in said
    assert "failed" not in said
