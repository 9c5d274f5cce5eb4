"""What of ``kernels/glu/`` is compiled ahead of time: each tile of the table, and the largest in its other forms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molora.kernels.glu import programs as glu
from molora.kernels.glu.launch import MAX_UNROLL
from tests.support import aot

LARGEST = 128
KERNELS = {"glu": glu.glu_kernel, "glu_rows": glu.glu_rows_kernel, "glu_columns": glu.glu_columns_kernel}
FLOATS = ("w_ptr", "scale1_ptr", "scale3_ptr", "scale2_ptr", "dw_ptr")
IN_PARTS = ("h2_ptr", "dh1_ptr", "dh3_ptr", "db1_ptr", "db3_ptr", "da2_ptr")
INTEGERS = ("ids_ptr", "expert_ptr")


def glu_variants(dtype: str) -> Iterator[aot.Variant]:
    """Two slots with silu and every gradient; at the largest rank also gelu, four slots, and frozen experts."""
    for kernel in KERNELS:
        for name, t in aot.tiles(kernel, dtype):
            yield _variant(name, kernel, dtype, t, {})
            if t.depth == LARGEST and dtype == "bf16":
                yield _variant(f"{name}-gelu", kernel, dtype, t, {"ACT": "gelu"})
                yield _variant(f"{name}-4_slots", kernel, dtype, t, {"SLOTS": 4, "BS": 4})
                yield from _frozen(name, kernel, dtype, t)


def _frozen(name: str, kernel: str, dtype: str, t: Any) -> Iterator[aot.Variant]:
    """Some gradients only: those of the weights alone, and those of one parameter alone."""
    if kernel == "glu_rows":
        nobody = dict.fromkeys(("du_ptr", "dv_ptr", "dh1_ptr", "dh3_ptr"))
        yield _variant(f"{name}-weights_only", kernel, dtype, t, nobody)
    if kernel == "glu_columns":
        yield _variant(f"{name}-A2_only", kernel, dtype, t, dict.fromkeys(("db1_ptr", "db3_ptr")))


def _variant(name: str, kernel: str, dtype: str, t: Any, changes: dict[str, Any]) -> aot.Variant:
    constants = {"SLOTS": 2, "ACT": "silu", "UPCAST": False, "BM": t.rows, "BF": t.cols, "BR": t.depth, "BS": 2}
    constants |= {"stride_wj": 1, **changes}
    unrolled = constants["SLOTS"] <= MAX_UNROLL and dtype != "fp32"
    constants["UNROLL"] = constants["SLOTS"] if unrolled else 1
    function = KERNELS[kernel]
    constants = {n: c for n, c in constants.items() if n in function.arg_names}
    types = {n: f"*{dtype}" for n in function.arg_names if n.endswith("_ptr")}
    types |= dict.fromkeys((*FLOATS, *IN_PARTS), "*fp32") | dict.fromkeys(INTEGERS, "*i64")
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in function.arg_names}
    rows = t.cols if kernel == "glu_columns" else t.rows
    return aot.Variant(f"{name}", function, signature, constants, t.warps, t.stages, True, rows)
