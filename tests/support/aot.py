"""Kernels compiled ahead of time for GPUs that are not here: what to compile, and what to read from the result."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from molora.kernels.rank import programs as concat
from molora.kernels.tiles import FUSED_RANK, TILES, Tile

ARCHS = (80, 90, 100)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes that one program may use
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


class Variant(NamedTuple):
    """One kernel with one set of compile-time constants. ``rows_of_tile``: M of its products; 0 without any."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    dots: bool
    rows_of_tile: int


class Compiled(NamedTuple):
    """What the compiler says of a variant: PTX, bytes of shared memory, bytes of stack (spills)."""

    ptx: str
    shared: int
    stack: int


def compiled(v: Variant, arch: int) -> Compiled:
    """The variant for compute capability ``arch`` / 10, with aligned pointers and widths as models have them."""
    index = {n: i for i, n in enumerate(v.signature)}
    aligned = [n for n, t in v.signature.items() if t.startswith("*") or t in ("i32", "i64")]
    attrs = {(index[n],): [["tt.divisibility", 16]] for n in aligned}
    constants = {(index[n],): c for n, c in v.constexprs.items()}
    source = ASTSource(v.kernel, v.signature, constants, attrs)
    options = {"num_warps": v.num_warps, "num_stages": v.num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return Compiled(kernel.asm["ptx"], kernel.metadata.shared, _stack(kernel.asm["cubin"]))


def _stack(cubin: bytes) -> int:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return max(int(n) for n in re.findall(r"STACK:(\d+)", said))


def tensor_core_instruction(arch: int, rows: int) -> str:
    """What the products of a tile with ``rows`` rows become."""
    if arch == 80 or rows < 64:
        return "mma.sync"
    return {90: "wgmma", 100: "tcgen05.mma"}[arch]


def _signature(kernel: Any, types: dict[str, str], constexprs: dict[str, Any]) -> dict[str, str]:
    """Types of all arguments in order; "i32" where nothing is said."""
    return {n: "constexpr" if n in constexprs else types.get(n, "i32") for n in kernel.arg_names}


def _variant(name: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], t: Tile, dots: bool) -> Variant:
    signature = _signature(kernel, types, constexprs)
    return Variant(name, kernel, signature, constexprs, t.warps, t.stages, dots, t.rows if dots else 0)


def tiles(kernel: str, dtype: str) -> Iterator[tuple[str, Tile]]:
    """The table's tiles for a kernel and dtype, each with a readable name."""
    for (name, many, ranks, itemsize), t in TILES.items():
        if name == kernel and itemsize == ITEMSIZE[dtype]:
            yield f"{kernel}-{many}-{ranks}-{dtype}", t


def concat_variants(dtype: str) -> Iterator[Variant]:
    """The rank-concat kernels in all modes; gates of two experts out of eight, and dense over eight."""
    return (v for part in (_contract, _expand, _outer, _gates) for v in part(dtype))


GATE_TYPES = {"w_ptr": "*fp32", "ids_ptr": "*i64", "expert_ptr": "*i64", "scale_ptr": "*fp32", "dw_ptr": "*fp32"}
TOP_K, DENSE = {"FORM": 1, "SLOTS": 2}, {"FORM": 2, "SLOTS": 8}


def _contract(dtype: str) -> Iterator[Variant]:
    p = f"*{dtype}"
    for name, t in tiles("contract", dtype):
        block = {"BM": t.rows, "BR": t.cols, "BK": t.depth, "UPCAST": False}
        x = {"x_ptr": p, "m_ptr": p}
        none = dict.fromkeys(("gated_ptr", "h_ptr", "dw_ptr", "w_ptr", "ids_ptr", "expert_ptr", "scale_ptr"))
        forward = {"stride_xk": 1, "stride_mk": 1}  # x A^T; backward reads B along its other side
        parts = {**block, **forward, **none, "MODE": 0, "FORM": 0, "SLOTS": 1, "stride_wt": 0, "stride_we": 0}
        yield _variant(f"{name}-parts", concat.contract_kernel, {**x, "out_ptr": "*fp32"}, parts, t, True)
        if t.cols > FUSED_RANK:
            continue
        types = {**x, **GATE_TYPES, "out_ptr": p, "gated_ptr": p, "h_ptr": p}
        h = {**block, **forward, **TOP_K, "MODE": 1, "h_ptr": None, "dw_ptr": None, "stride_we": 1}
        yield _variant(f"{name}-forward", concat.contract_kernel, types, h, t, True)
        forms = (("top_k", TOP_K), ("dense", DENSE)) if dtype == "bf16" else (("top_k", TOP_K),)
        for form, constants in forms:
            back = {**block, **constants, "MODE": 2, "stride_xk": 1, "stride_mr": 1, "stride_we": 1}
            back |= {"ids_ptr": None} if form == "dense" else {}
            yield _variant(f"{name}-backward-{form}", concat.contract_kernel, types, back, t, True)


def _expand(dtype: str) -> Iterator[Variant]:
    p = f"*{dtype}"
    types = {"h_ptr": p, "b_ptr": p, "base_ptr": p, "y_ptr": p}
    for name, t in tiles("expand", dtype):
        block = {"BM": t.rows, "BN": t.cols, "BR": t.depth, "UPCAST": False, "SHARE": 1}
        forward = {**block, "ONE_BLOCK": True, "stride_br": 1, "stride_ao": 1}
        back = {**block, "ONE_BLOCK": True, "base_ptr": None, "stride_bo": 1, "stride_an": 0, "stride_ao": 0}
        yield _variant(f"{name}-backward", concat.expand_kernel, types, back, t, True)
        if "-128-" in name:
            wide = {**forward, "ONE_BLOCK": False, "SHARE": 2}
            yield _variant(f"{name}-blocks", concat.expand_kernel, types, wide, t, True)
        yield _variant(f"{name}-forward", concat.expand_kernel, types, forward, t, True)


def _outer(dtype: str) -> Iterator[Variant]:
    p = f"*{dtype}"
    types = {"wide_ptr": p, "rank_ptr": p, "out_ptr": "*fp32"}
    for name, t in tiles("outer", dtype):
        block = {"BM": t.rows, "BR": t.cols, "BT": t.depth, "UPCAST": False, "stride_wm": 1, "stride_rr": 1}
        yield _variant(f"{name}-dA", concat.outer_kernel, types, {**block, "stride_om": 1}, t, True)
        yield _variant(f"{name}-dB", concat.outer_kernel, types, {**block, "stride_or": 1}, t, True)


def _gates(dtype: str) -> Iterator[Variant]:
    """Kernels without products: they compute in float32, whatever they read and write."""
    if dtype != "bf16":
        return
    p = f"*{dtype}"
    for (name, _, ranks, _), t in TILES.items():
        if name != "gate":
            continue
        types = {**GATE_TYPES, "p_ptr": "*fp32", "out_ptr": p, "gated_ptr": p, "h_ptr": p}
        block = {"BM": t.rows, "BR": t.cols}
        back = {**block, **TOP_K, "BACKWARD": True, "stride_we": 1}
        yield _variant(f"gate-{ranks}-{dtype}", concat.gate_kernel, types, back, t, False)
        dw = {**block, **TOP_K}
        yield _variant(f"weight_grad-{ranks}-{dtype}", concat.weight_grad_kernel, types, dw, t, False)
        slots = {n: p for n in ("token_ptr", "slot_ptr", "token_out_ptr", "slot_out_ptr")}
        both = {**block, "SLOTS": 2, "stride_we": 1}
        yield _variant(f"slot_gate-{ranks}-{dtype}", concat.slot_gate_kernel, {**GATE_TYPES, **slots}, both, t, False)


def over_variants(dtype: str, others: Iterable[Variant] = ()) -> Any:
    """Parametrize a test over every kernel and tile of a dtype, and over the architectures.

    In bfloat16 every form of a kernel; elsewhere the last form that a kernel's list has for a tile.
    """
    every = [*concat_variants(dtype), *others]
    if dtype != "bf16":
        every = list({v.name.split(dtype)[0]: v for v in every}.values())
    found = pytest.mark.parametrize("variant", every, ids=lambda v: v.name)
    return lambda test: found(pytest.mark.parametrize("arch", ARCHS, ids=lambda a: f"sm_{a}")(test))


def check(variant: Variant, arch: int, exact_float32: bool = False) -> None:
    """Fits the chip; for half precision also: no spills, and tensor-core instructions for each product."""
    c = compiled(variant, arch)
    assert c.shared <= SHARED_LIMIT[arch], f"{c.shared} bytes of shared memory"
    if exact_float32:
        return
    assert c.stack <= 16, f"{c.stack} bytes of registers spill into memory: a smaller tile, or more warps"
    if variant.dots:
        assert tensor_core_instruction(arch, variant.rows_of_tile) in c.ptx
