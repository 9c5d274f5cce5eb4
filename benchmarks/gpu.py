"""Speed of the mixture kernels on a GPU: beside other ways to write the same sum, and against the memory's limit.

Every way is checked against float64 before it is timed. Times are medians of interleaved calls on buffers that do not
fit the cache; the limit is counted in bytes and products, once with the datasheet's rates and once with rates that
this GPU reached in a copy of 1 GiB and a square product of 8192.
"""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import gpu_peers
from benchmarks.gpu_peers import Mixture
from benchmarks.timing import ROOT, machine
from molora.errors import ConfigError

NOMINAL = {"H100": (3.35e12, 790e12), "H200": (4.8e12, 790e12), "A100": (2.0e12, 260e12)}  # bytes/s, products/s


class Shape(NamedTuple):
    """T tokens through a linear (O, I) with E experts of rank r, K chosen (0: all, by dense weights)."""

    T: int
    I: int  # noqa: E741
    O: int  # noqa: E741
    E: int
    r: int
    K: int

    @property
    def name(self) -> str:
        return f"T={self.T} {self.I}->{self.O} E={self.E} r={self.r} K={self.K or 'all'}"


S0 = Shape(8192, 4096, 14336, 8, 16, 2)
SHAPES = (
    S0,
    *(S0._replace(T=t) for t in (1, 16, 256, 2048, 32768)),
    *(
        S0._replace(E=e, r=r, K=k)
        for e, r, k in ((4, 8, 2), (8, 64, 2), (16, 32, 2), (64, 16, 8), (64, 1, 8), (9, 16, 0))
    ),
    *(S0._replace(I=i, O=o) for i, o in ((4096, 4096), (4096, 1024), (14336, 4096))),
)
QUICK = (S0, S0._replace(T=256))
# Goals at S0, of the time for the experts alone: against the limit with measured rates, and against other ways.
LIMIT_GOALS = {"forward": 1.30, "backward": 1.45}
PEER_GOALS = {"scatter": 3.0, "grouped_mm": 5.0, "gather loop": 7.0, "eager concat": 1.2}


def limit(s: Shape, bandwidth: float, rate: float) -> dict[str, float]:
    """Seconds of the rank-concat steps, each the larger of its traffic and its products; bfloat16."""
    R = s.E * s.r
    x, y, h, A, B = (2 * n for n in (s.T * s.I, s.T * s.O, s.T * R, R * s.I, s.O * R))

    def step(traffic: int, products: int) -> float:
        return max(traffic / bandwidth, 2 * products / rate)

    shrink, expand = s.T * s.I * R, s.T * s.O * R
    return {
        "forward": step(x + A + 2 * h, shrink) + step(2 * y + B + h, expand),
        "backward": step(y + B + 2 * h, expand)
        + step(y + B + h, expand)
        + step(2 * x + A + h, shrink)
        + step(x + A + h, shrink),
    }


def measured_rates() -> tuple[float, float]:
    """Bytes per second of a copy of 1 GiB (read and written), and products per second of an 8192^3 bfloat16 product."""
    a = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    b = torch.empty_like(a)
    copy = statistics.median(timed({"copy": lambda: b.copy_(a)}, 20)["copy"])
    m = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    product = statistics.median(timed({"mm": lambda: m @ m}, 20)["mm"])
    return 2 * a.nbytes / copy, 2 * 8192**3 / product


def timed(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per call by the device's clock, interleaved; the first three rounds do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    flush = torch.empty(2**26, dtype=torch.float32, device="cuda")  # 256 MiB: more than any cache
    for n in range(rounds + 3):
        events = {}
        for name, call in work.items():
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize()
        if n >= 3:
            for name, (start, end) in events.items():
                seconds[name].append(start.elapsed_time(end) / 1e3)
    return seconds


def correct(way: Callable[[Mixture], Tensor], m: Mixture) -> float:
    """Root mean square distance from float64 over that of plain concat; raises where it is above 2."""
    wanted = gpu_peers.exact(m)
    ours, plain = ((f(m)[:256].double() - wanted).square().mean().sqrt() for f in (way, gpu_peers.eager_concat))
    ratio = float(ours / plain.clamp_min(1e-12))
    if not ratio <= 2.0:
        raise AssertionError(f"{way.__name__}: {ratio:.1f} times as far from float64 as plain PyTorch: not timed")
    return ratio


def measure(s: Shape, rounds: int) -> dict[str, Any]:
    """Forward and backward of each way for one shape: seconds, launches, peak memory above the base's own."""
    m = gpu_peers.mixture(s)
    grad = torch.randn(s.T, s.O, dtype=torch.bfloat16, device="cuda")
    forward: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, way in gpu_peers.WAYS.items():
        if way is not gpu_peers.base_only and reason_against(name, s) is None:
            rows[name] = {"distance": correct(way, m)}
        if reason_against(name, s) is None:
            forward[name] = lambda way=way: way(m)
            both[name] = lambda way=way: torch.autograd.grad(way(m), m.leaves(), grad, allow_unused=True)
            rows.setdefault(name, {}).update(memory_and_launches(forward[name], both[name]))
    with torch.no_grad():
        found = timed(forward, rounds)
    full = timed(both, rounds)
    for name, row in rows.items():
        row["forward_s"], row["both_s"] = statistics.median(found[name]), statistics.median(full[name])
        row["quantiles_s"] = {
            k: statistics.quantiles(v, n=5)[::3] for k, v in (("forward", found[name]), ("both", full[name]))
        }
    return {"shape": s._asdict(), "name": s.name, "ways": rows}


def reason_against(name: str, s: Shape) -> str | None:
    """Why a way is left out for a shape, or None."""
    if s.K == 0 and name in ("gather loop", "grouped_mm", "scatter", "sorted"):
        return "weighs all experts"
    if name in ("grouped_mm", "scatter") and s.r % 8:
        return "takes ranks that are multiples of 8"
    return None


def memory_and_launches(forward: Callable[[], Any], both: Callable[[], Any]) -> dict[str, Any]:
    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile, torch.no_grad():
        forward()
        torch.cuda.synchronize()
    return {"peak_mib": peak / 2**20, "launches": sum(e.count for e in profile.key_averages())}


def figures(result: dict[str, Any], limits: dict[str, float]) -> list[dict[str, Any]]:
    """The goals at S0: the experts' own time is a way's time less the base's."""
    ways = result["ways"]
    base = ways["base"]
    own = {
        n: (w["forward_s"] - base["forward_s"], w["both_s"] - base["both_s"]) for n, w in ways.items() if n != "base"
    }
    ours = own["molora"]
    out = [
        _figure("forward over limit", ours[0] / limits["forward"], LIMIT_GOALS["forward"]),
        _figure("backward over limit", (ours[1] - ours[0]) / limits["backward"], LIMIT_GOALS["backward"]),
        _figure("overhead over the frozen linear, forward and backward", ours[1] / base["both_s"], 0.21),
    ]
    return out + [
        _figure(f"speed-up over {n}", own[n][1] / ours[1], g, True) for n, g in PEER_GOALS.items() if n in own
    ]


def _figure(name: str, value: float, goal: float, at_least: bool = False) -> dict[str, Any]:
    return {"name": name, "value": value, "goal": goal, "met": value >= goal if at_least else value <= goal}


def show(results: list[dict[str, Any]], lines: list[dict[str, Any]], console: Console) -> None:
    """Figures at S0, then a table for each shape."""
    table = Table("figure at S0", "measured", "goal", "", title="molora bench gpu", title_justify="left")
    for f in lines:
        table.add_row(
            f["name"], f"{f['value']:.2f}", f"{f['goal']:.2f}", "[green]met[/]" if f["met"] else "[red]missed[/]"
        )
    console.print(table)
    for result in results:
        names = ("way", "forward, us", "forward + backward, us", "peak MiB", "launches")
        table = Table(*names, title=result["name"], title_justify="left")
        for name, w in result["ways"].items():
            cells = (
                f"{w['forward_s'] * 1e6:,.0f}",
                f"{w['both_s'] * 1e6:,.0f}",
                f"{w['peak_mib']:,.0f}",
                str(w["launches"]),
            )
            table.add_row(name, *cells)
        console.print(table)


def main(out: Path | None = None, check: bool = False, quick: bool = False) -> int:
    """Measure, print, write a dated JSON; with ``check``, 1 when a goal was missed.

    Raises:
        ConfigError: where there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench gpu: got no CUDA device, expected one; `molora bench cpu` needs none")
    console = Console()
    device = torch.cuda.get_device_properties(0)
    shapes, rounds = (QUICK, 10) if quick else (SHAPES, 30)
    results = []
    with Progress(console=console) as progress:
        task = progress.add_task(device.name, total=len(shapes) + 1)
        rates = measured_rates()
        progress.advance(task)
        for s in shapes:
            results.append(measure(s, rounds))
            progress.advance(task)
    nominal = next((r for n, r in NOMINAL.items() if n in device.name), None)
    limits = {"measured": limit(S0, *rates)} | ({"nominal": limit(S0, *nominal)} if nominal else {})
    lines = figures(results[0], limits["measured"])
    show(results, lines, console)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = out or ROOT / "benchmarks" / "results" / f"gpu-{today}{'-quick' if quick else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    gpu = {
        "name": device.name,
        "memory_gib": round(device.total_memory / 2**30, 1),
        "bytes_per_s": rates[0],
        "flops": rates[1],
    }
    report = {"date": today, "machine": machine(), "gpu": gpu, "limits_s": limits, "figures": lines, "results": results}
    path.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {path}")
    return int(check and not all(f["met"] for f in lines))
