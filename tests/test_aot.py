"""Every kernel and tile compiles for three generations of GPUs, keeps to registers and uses their tensor cores.

No GPU is needed: the compiler and the tool that reads its output are in Triton's package.
"""

from __future__ import annotations

import pytest

from tests import aot

pytest.importorskip("triton", reason="the extra 'triton' is not installed")


@pytest.mark.parametrize("arch", aot.ARCHS, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("variant", [v for d in ("bf16", "fp16") for v in aot.variants(d)], ids=lambda v: v.name)
def test_half_precision_tiles(variant: aot.Variant, arch: int):
    c = aot.compiled(variant, arch)
    assert c.stack <= 16, f"{c.stack} bytes of registers spill into memory: a smaller tile, or more warps"
    assert c.shared <= aot.SHARED_LIMIT[arch], f"{c.shared} bytes of shared memory"
    if variant.dots:
        assert aot.tensor_core_instruction(arch, variant.rows_of_tile) in c.ptx


@pytest.mark.parametrize("arch", aot.ARCHS, ids=lambda a: f"sm_{a}")
@pytest.mark.parametrize("variant", aot.variants("fp32"), ids=lambda v: v.name)
def test_float32_tiles_fit(variant: aot.Variant, arch: int):
    """Exact float32 products run without tensor cores and may spill; they have to fit."""
    assert aot.compiled(variant, arch).shared <= aot.SHARED_LIMIT[arch]
