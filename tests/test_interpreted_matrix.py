"""Cells of the behaviour matrix over all recipes on the tiny Llama, with every site on the Triton kernels."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from tests.test_interpreted import run

CELLS = {
    "identity": ["test_conversion.py::test_zero_init_is_identity"],
    "oracle": ["test_formulas.py", "test_formulas_blocks.py", "test_formulas_two_pass.py"],
    "gradients": ["test_training_steps.py::test_every_trainable_parameter_gets_a_gradient"],
    "padding": ["test_invariances.py::test_padding_on_either_side_is_no_padding"],
    "checkpointing": ["test_checkpointing.py::test_same_loss_and_gradients"],
}


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_behaviour_matrix_on_triton(cell: str):
    only = [] if cell == "oracle" else ["-k", "llama and not fp16 and not bf16"]
    said = run(*(f"tests/{t}" for t in CELLS[cell]), *only, MOLORA_TEST_KERNEL="triton")
    assert "passed" in said
    assert "failed" not in said
