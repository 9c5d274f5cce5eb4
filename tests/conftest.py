"""Fixtures and the one table of tolerances."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers

# Triton kernels run compiled, or in the interpreter, which has to be on from the start: see test_interpreted.py.
collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


class Tolerance(NamedTuple):
    """How far two results may be apart, and why."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    "formula": Tolerance(1e-12, 1e-12, "float64 against a loop in float64: only the order of sums differs"),
    "same_math_fp32": Tolerance(1e-5, 1e-5, "float32, the same sums in another order through two layers"),
    "identity_ffn_fp32": Tolerance(1e-5, 1e-6, "weights that sum to 1 only to rounding, times the block's output"),
    "peft_lora": Tolerance(1e-5, 1e-6, "one expert against PEFT's LoRA: the sum is rounded once here, twice there"),
    "peft_xlora": Tolerance(1e-4, 1e-5, "two passes; PEFT gates the input of A, molora its output"),
    "fp16": Tolerance(4e-3, 0.0, "float16 has 11 bits of mantissa; root mean squares, since one element says little"),
    "bf16": Tolerance(2e-2, 0.0, "bfloat16 has 8 bits of mantissa; root mean squares, since one element says little"),
    "resumed": Tolerance(1e-6, 1e-6, "the same steps in new processes; only an all-reduce may add in another order"),
    "real_model_fp32": Tolerance(1e-4, 1e-4, "float32 through 30 layers and some steps of AdamW, rows split otherwise"),
    "additive": Tolerance(1e-5, 1e-5, "float32 sums over rows split into micro-batches"),
}


def close(a: torch.Tensor, b: torch.Tensor, name: str) -> None:
    """Assert closeness by a tolerance's name."""
    t = TOLERANCES[name]
    if name in ("fp16", "bf16"):
        assert a.dtype == b.dtype
        error, size = (x.double().square().mean().sqrt().item() for x in (a.double() - b.double(), b))
        assert error <= t.rtol * size, f"off by {error:.3g} of {size:.3g} in the root mean square ({name}: {t.reason})"
        return
    torch.testing.assert_close(a, b, rtol=t.rtol, atol=t.atol, msg=lambda m: f"{m}\n({name}: {t.reason})")


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """One thread, fixed seeds, deterministic algorithms; quiet transformers."""
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for adapters that several tests share."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mixture of tests/planted.py with its texts by domain; for tests that leave it as it is."""
    from tests.planted import planted  # seconds of imports that most tests do without

    return planted(tmp_path_factory.mktemp("planted"))
