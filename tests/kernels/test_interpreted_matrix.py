"""Cells of the behaviour matrix over all recipes on the tiny Llama, with every site on the Triton kernels."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from tests.kernels.test_interpreted import run, wide_tiles

__all__ = ["wide_tiles"]  # the fixture of both files
CELLS = {
    "identity": ["behaviour/test_conversion.py::test_zero_init_is_identity"],
    "oracle": ["layers/test_formulas.py", "layers/test_formulas_blocks.py", "forward/test_formulas_two_pass.py"],
    "gradients": ["behaviour/test_training_steps.py::test_every_trainable_parameter_gets_a_gradient"],
    "padding": ["behaviour/test_invariances.py::test_padding_on_either_side_is_no_padding"],
    "checkpointing": ["forward/test_checkpointing.py::test_same_loss_and_gradients"],
}


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_behaviour_matrix_on_triton(cell: str, wide_tiles: Path):
    only = [] if cell == "oracle" else ["-k", "llama and not fp16 and not bf16"]
    tests = (f"tests/{t}" for t in CELLS[cell])
    said = run(*tests, *only, MOLORA_TEST_KERNEL="triton", MOLORA_TILES=str(wide_tiles))
    assert "passed" in said
    assert "failed" not in said
