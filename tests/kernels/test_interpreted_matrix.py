"""Cells of the behaviour matrix over all recipes on the tiny Llama, with every site on the Triton kernels."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from molora.kernels.tiles import TILES
from tests.kernels.test_interpreted import run

CELLS = {
    "identity": ["behaviour/test_conversion.py::test_zero_init_is_identity"],
    "oracle": ["layers/test_formulas.py", "layers/test_formulas_blocks.py", "forward/test_formulas_two_pass.py"],
    "gradients": ["behaviour/test_training_steps.py::test_every_trainable_parameter_gets_a_gradient"],
    "padding": ["behaviour/test_invariances.py::test_padding_on_either_side_is_no_padding"],
    "checkpointing": ["forward/test_checkpointing.py::test_same_loss_and_gradients"],
}


@pytest.fixture(scope="module")
def wide_tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiles that hold all rows of the tiny model at once: the interpreter takes time by programs, not by size."""
    wide = {k: t._replace(rows=64) for k, t in TILES.items() if k[0] in ("contract", "expand") and k[3] == 4}
    path = tmp_path_factory.mktemp("tiles") / "tiles.json"
    path.write_text(json.dumps({"tiles": [[list(k), list(t)] for k, t in wide.items()]}))
    return path


@pytest.mark.bits
@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_behaviour_matrix_on_triton(cell: str, wide_tiles: Path):
    only = [] if cell == "oracle" else ["-k", "llama and not fp16 and not bf16"]
    tests = (f"tests/{t}" for t in CELLS[cell])
    said = run(*tests, *only, MOLORA_TEST_KERNEL="triton", MOLORA_TILES=str(wide_tiles))
    assert "passed" in said
    assert "failed" not in said
