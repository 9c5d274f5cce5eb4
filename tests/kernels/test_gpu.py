"""What only a GPU can show: no access out of bounds, replayed graphs, no waiting for the device, very large outputs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from molora.kernels import functional
from tests.support.gpu_calls import CALLS, inputs, step
from tests.support.places import ROOT
from tests.support.tiny import batch, converted

RECIPES = ("mixlora", "mola", "smora", "xlora")

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_themselves(name: str):
    """On the CPU, too: what the tests below run has a value and gradients."""
    found = step(name, inputs(17, "cpu", torch.float32))
    assert len(found) > 2
    assert all(t.isfinite().all() for t in found)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_nothing_waits_for_the_device(name: str):
    a = inputs(130, "cuda")
    step(name, a)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(name, a)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_graph_replays_with_another_routing(name: str):
    """Captured once, run with other ids and weights in the same memory: the bits of a call outside of a graph."""
    a, other = inputs(130, "cuda"), inputs(130, "cuda", seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(name, a)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(name, a)
    with torch.no_grad():
        for n, t in a.items():
            t.copy_(other[n])
    graph.replay()
    for got, wanted in zip(captured, step(name, other), strict=True):
        assert torch.equal(got, wanted)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_twenty_times_the_same_bits(name: str):
    a = inputs(257, "cuda")
    first = step(name, a)
    for _ in range(20):
        assert all(torch.equal(x, y) for x, y in zip(first, step(name, a), strict=True))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_converted_model_agrees_with_the_cpu(recipe: str, root: Path):
    """Logits and gradients of the default kernel, in float32, against the same model on the CPU."""
    found: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        model = converted(recipe, "llama", root).to(device).eval()
        out = model(**{k: v.to(device) for k, v in batch("llama").items()})
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found[device] = [t.detach().cpu() for t in (out.logits, *grads)]
    for got, wanted in zip(found["cuda"], found["cpu"], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)


@gpu
@pytest.mark.gpu
@pytest.mark.slow
def test_more_elements_than_an_int32_counts():
    """The last rows of an output of 2**31 elements and more are those of a small call on the same tokens."""
    width, rows = 16384, 2**31 // 16384 + 130
    free, _ = torch.cuda.mem_get_info()
    if free < 5 * rows * width:
        pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free, {5 * rows * width / 1e9:.0f} GB are needed")
    x = torch.randn(rows, 64, device="cuda", dtype=torch.bfloat16)
    A, B = (torch.randn(s, device="cuda", dtype=torch.bfloat16) for s in ((16, 64), (width, 16)))
    base = x.new_zeros(1, width).expand(rows, width)
    maps = {"expert_R": torch.zeros(16, dtype=torch.int64, device="cuda"), "scale_R": torch.ones(16, device="cuda")}
    y = functional.rank_mix(base, x, A, B, **maps)
    assert y.numel() > 2**31
    assert torch.equal(y[-64:], functional.rank_mix(base[-64:], x[-64:], A, B, **maps))


@gpu
@pytest.mark.gpu
@pytest.mark.slow
def test_no_access_out_of_bounds():
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed (it comes with the CUDA toolkit)")
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "tests.support.gpu_calls"]
    env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else neighbours lie in one block
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
