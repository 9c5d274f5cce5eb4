"""The one table of tolerances: how far two results may be apart, and why; and how much of each bound the tests use."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """How far two results may be apart, and why."""

    rtol: float
    atol: float
    reason: str


TOLERANCES = {
    "formula": Tolerance(1.5e-13, 1.5e-13, "float64 against a loop in float64: only the order of sums differs"),
    "same_math_fp32": Tolerance(1e-5, 1e-5, "float32, the same sums in another order through two layers"),
    "identity_ffn_fp32": Tolerance(1e-5, 1e-6, "weights that sum to 1 only to rounding, times the block's output"),
    "peft_lora": Tolerance(1e-5, 1e-6, "one expert against PEFT's LoRA: the sum is rounded once here, twice there"),
    "peft_xlora": Tolerance(1e-4, 1e-5, "two passes; PEFT gates the input of A, molora its output"),
    "fp16": Tolerance(4e-3, 0.0, "float16 has 11 bits of mantissa; root mean squares, since one element says little"),
    "bf16": Tolerance(2e-2, 0.0, "bfloat16 has 8 bits of mantissa; root mean squares, since one element says little"),
    "real_model_fp32": Tolerance(5e-6, 5e-6, "float32 through 30 layers and some steps of AdamW, rows split otherwise"),
    "additive": Tolerance(6e-6, 6e-6, "float32 sums over rows split into micro-batches"),
    "interpreter_fp32": Tolerance(2e-6, 2e-6, "numpy's BLAS in Triton's interpreter rounds by a row's place in a tile"),
    "svd_fp32": Tolerance(0.0, 6e-6, "columns of a float32 SVD are orthonormal to its own rounding"),
    "merged_fp32": Tolerance(7e-6, 7e-6, "W + s B A is rounded once as a weight, W x + s B A x as outputs"),
    "sums_of_tokens_fp32": Tolerance(3e-5, 3e-5, "float32 sums over 40 tokens, of values of size 10"),
    "difference_of_losses": Tolerance(2e-4, 2e-7, "a small difference of two float32 losses"),
    "counted": Tolerance(2e-6, 2e-5, "sums of weights that are rounded to multiples of 2**-20 each"),
    "logged": Tolerance(5e-7, 5e-6, "transformers rounds logged losses"),
    "a_vanishing_expert": Tolerance(5e-5, 5e-5, "an expert of probability e**-10 takes that much from the others"),
}

used: dict[str, tuple[float, str]] = {}  # by name: the largest error as a part of the bound, and the test that saw it


def close(a: Tensor, b: Tensor, name: str) -> None:
    """Assert closeness by a tolerance's name."""
    t = TOLERANCES[name]
    if name in ("fp16", "bf16"):
        assert a.dtype == b.dtype
        error, size = (x.double().square().mean().sqrt().item() for x in (a.double() - b.double(), b))
        add({name: (error / (t.rtol * size) if error else 0.0, _test())})
        assert error <= t.rtol * size, f"off by {error:.3g} of {size:.3g} in the root mean square ({name}: {t.reason})"
        return
    torch.testing.assert_close(a, b, rtol=t.rtol, atol=t.atol, msg=lambda m: f"{m}\n({name}: {t.reason})")
    if a.numel():
        share = (a.double() - b.double()).abs() / (t.atol + t.rtol * b.double().abs())
        add({name: (share.nan_to_num(0.0).max().item(), _test())})


def add(found: Mapping[str, tuple[float, str]]) -> None:
    """Keep the larger of what is known and ``found``, by name."""
    for name, (share, test) in found.items():
        if share >= used.get(name, (0.0, ""))[0]:
            used[name] = share, test


def report() -> list[str]:
    """A line for each tolerance: the largest error as a part of the bound, and where it was seen."""
    lines = []
    for name in TOLERANCES:
        share, test = used.get(name, (0.0, "not used"))
        lines.append(f"{name:20} {share:9.2g}  {test}")
    return lines


def _test() -> str:
    return os.environ.get("PYTEST_CURRENT_TEST", "").partition(" ")[0]
