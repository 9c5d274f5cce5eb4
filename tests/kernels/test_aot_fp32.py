"""float32: every tile fits the chips. Exact products run without tensor cores, and may spill.

No GPU is needed: the compiler and the tool that reads its output are in Triton's package.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="the extra 'triton' is not installed")

from tests.support import aot
from tests.support.aot_glu import glu_variants
from tests.support.aot_grouped import grouped_variants


@aot.over_variants("fp32", [*glu_variants("fp32"), *grouped_variants("fp32")])
def test_compiles(variant: aot.Variant, arch: int):
    aot.check(variant, arch, exact_float32=True)
