"""The GPU benchmark without a GPU: its ways to write the sum agree, its limit is the arithmetic it claims to be."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu, gpu_peers, tune
from molora.errors import ConfigError
from molora.kernels import dispatch
from molora.kernels.tiles import TILES
from tests.support.tolerances import close

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="plain PyTorch is what is looked at")

SMALL = gpu.Shape(40, 64, 48, 4, 8, 2)
# What the experts add; the compiled way is the eager one under a compiler that may be missing here.
WAYS = [n for n in gpu_peers.WAYS if n not in ("base", "compiled concat")]
PAIRS = [(n, s) for n in WAYS for s in (SMALL, SMALL._replace(K=0)) if gpu.reason_against(n, s) is None]


@pytest.mark.parametrize(("name", "shape"), PAIRS, ids=lambda p: p if isinstance(p, str) else p.name)
def test_every_way_is_the_same_function(name: str, shape: gpu.Shape):
    """Value and gradients, in float32 on a CPU."""
    m = gpu_peers.mixture(shape, "cpu", torch.float32)
    y = gpu_peers.WAYS[name](m)
    close(y.double(), gpu_peers.exact(m, shape.T), "same_math_fp32")
    grad = torch.ones_like(y)
    wanted = torch.autograd.grad(gpu_peers.eager_concat(m), m.leaves(), grad)
    for ours, theirs in zip(torch.autograd.grad(y, m.leaves(), grad), wanted, strict=True):
        close(ours, theirs, "sums_of_tokens_fp32")


def test_limit_is_traffic_over_bandwidth_or_products_over_rate():
    """At the benchmark's main shape on an H100: the memory decides, 548 MB forward and 693 MB backward."""
    bandwidth, rate = gpu.NOMINAL["H100"]
    found = gpu.limit(gpu.S0, bandwidth, rate)
    assert found["forward"] == pytest.approx(548e6 / bandwidth, rel=0.01)
    assert found["backward"] == pytest.approx(693e6 / bandwidth, rel=0.01)
    assert gpu.limit(gpu.S0, 1e18, rate)["forward"] == pytest.approx(38.7e9 / rate, rel=0.01)


def test_figures_are_of_the_experts_own_time():
    def row(forward: float, both: float) -> dict[str, float]:
        return {"forward_s": forward, "both_s": both}

    ways = {"base": row(1.0, 2.0), "molora": row(1.1, 2.3), "eager concat": row(1.2, 2.6)}
    lines = gpu.figures({"ways": ways}, {"forward": 0.1, "backward": 0.1})
    value = {f["name"]: f["value"] for f in lines}
    assert value["forward over limit"] == pytest.approx(1.0)
    assert value["backward over limit"] == pytest.approx(2.0)
    assert value["speed-up over eager concat"] == pytest.approx(2.0)
    assert [f["met"] for f in lines] == [True, False, True, True]


def test_tiles_to_try_are_few_and_start_with_the_tables_own():
    for key in TILES:
        if key[0] in tune.KERNELS and key[3] == 2:
            found = tune.candidates(key)
            assert found[0] == TILES[key]
            assert 1 <= len(found) == len(set(found)) <= tune.MOST


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("suite", [gpu, tune])
def test_without_a_device_it_says_so(suite: object):
    with pytest.raises(ConfigError, match="got no CUDA device"):
        suite.main()  # type: ignore[attr-defined]
