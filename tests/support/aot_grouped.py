"""What of ``kernels/sorted/programs.py`` is compiled ahead of time: each tile both ways, the largest in every form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from molora.kernels.sorted import programs as grouped
from molora.kernels.sorted.launch import GATHER_EXPAND, GATHER_SHRINK
from tests.support import aot

# The order of rows and what stands beside the elements; two slots of 64 experts.
POINTERS = {"token_ptr": "*i32", "end_ptr": "*i32", "tile_ptr": "*i32", "start_ptr": "*i64", "ids_ptr": "*i64"}
POINTERS |= dict.fromkeys(("w_ptr", "scale_ptr", "dw_ptr"), "*fp32")
COMMON: dict[str, Any] = {"SLOTS": 2, "UPCAST": False, "BE": 128, "EVEN": True}
UNEQUAL: dict[str, Any] = {"EVEN": False}  # ranks
SORTED: dict[str, Any] = {"token_ptr": None, "SLOTS": 1, **UNEQUAL}  # rows
Forms = dict[str, dict[str, Any]]


def grouped_variants(dtype: str) -> Iterator[aot.Variant]:
    """The sorted kernels with all tiles of the table for "bf16", "fp16" or "fp32", and the gather kernels."""
    for kernel, forms in (("grouped_shrink", _shrink), ("grouped_expand", _expand), ("grouped_outer", _outer)):
        for name, t in aot.tiles(kernel, dtype):
            yield from _variants(
                name, getattr(grouped, f"{kernel}_kernel"), dtype, t, forms(t, int(name.split("-")[2]))
            )
    for kernel, t in (("gather_shrink", GATHER_SHRINK), ("gather_expand", GATHER_EXPAND)):
        yield from _variants(f"{kernel}-{dtype}", getattr(grouped, f"{kernel}_kernel"), dtype, t, _gather(t))


def _variants(name: str, kernel: Any, dtype: str, t: aot.Tile, forms: Forms) -> Iterator[aot.Variant]:
    floats = {"h_ptr": "*fp32"} if "gather" in name else {"out_ptr": "*fp32"} if "outer" in name else {}
    types = {n: f"*{dtype}" for n in kernel.arg_names if n.endswith("_ptr")} | POINTERS | floats
    for form, constants in forms.items():
        every_form = dtype == "bf16" and ("-128-" in name or "gather" in name)  # 128: where registers are scarcest
        if every_form or form not in ("unequal", "sorted_rows"):
            known = {n: v for n, v in (COMMON | constants).items() if n in kernel.arg_names}
            signature = {n: "constexpr" if n in known else types.get(n, "i32") for n in kernel.arg_names}
            rows = 0 if "gather" in name else t.rows
            yield aot.Variant(f"{name}-{form}", kernel, signature, known, t.warps, t.stages, rows > 0, rows)


def _shrink(t: aot.Tile, ranks: int) -> Forms:
    block = {"RANK": ranks, "BM": t.rows, "BR": t.cols, "BK": t.depth, "stride_xk": 1, "stride_ws": 1}
    forward = {**block, "h_ptr": None, "dw_ptr": None, "stride_mk": 1}
    backward = {**block, "stride_mr": 1}
    rows = {**forward, **SORTED, "w_ptr": None, "stride_wt": 0, "stride_ws": 0}
    return {"forward": forward, "backward": backward, "unequal": {**backward, **UNEQUAL}, "sorted_rows": rows}


def _expand(t: aot.Tile, ranks: int) -> Forms:
    block = {"RANK": ranks, "BM": t.rows, "BN": t.cols, "BR": t.depth, "stride_ao": 1}
    forward = {**block, "FIRST": True, "stride_br": 1}
    backward = {**block, "FIRST": False, "stride_bo": 1}
    rows = {**forward, **SORTED, "base_ptr": None, "stride_at": 0, "stride_ao": 0}
    return {"forward": forward, "backward": backward, "unequal": {**forward, **UNEQUAL}, "sorted_rows": rows}


def _outer(t: aot.Tile, ranks: int) -> Forms:
    block = {"RANK": ranks, "BM": t.rows, "BR": t.cols, "BT": t.depth, "stride_wm": 1}
    of_B = {**block, "stride_or": 1}
    return {"dA": {**block, "stride_om": 1}, "dB": of_B, "sorted_rows": {**of_B, **SORTED}}


def _gather(t: aot.Tile) -> Forms:
    shrink = {"BR": t.cols, "BK": t.depth, "stride_xk": 1, "stride_ak": 1}
    expand = {"BN": t.cols, "BR": t.depth, "stride_br": 1, "stride_ao": 1, "stride_ws": 1}
    block = {"RANK": 16, **(shrink if t is GATHER_SHRINK else expand)}
    return {"forward": block, "unequal": {**block, **UNEQUAL}}
