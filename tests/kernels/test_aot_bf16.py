"""bfloat16: every kernel and tile compiles for three generations of GPUs, without spills, onto their tensor cores.

No GPU is needed: the compiler and the tool that reads its output are in Triton's package.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from tests.support import aot
from tests.support.aot_glu import glu_variants
from tests.support.aot_grouped import grouped_variants


@aot.over_variants("bf16", [*glu_variants("bf16"), *grouped_variants("bf16")])
def test_compiles(variant: aot.Variant, arch: int):
    aot.check(variant, arch)
