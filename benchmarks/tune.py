"""Times a few tiles for each kernel of the table on this GPU and writes the fastest to a file for MOLORA_TILES.

Not part of any run: another tile is another order of sums, so who uses the file uses it from the start of a training
to its end. Tiles whose result is further from float64 than the table's own are left out.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.gpu import timed
from benchmarks.timing import ROOT
from molora.errors import ConfigError
from molora.kernels.gates import Gates
from molora.kernels.rank import launch
from molora.kernels.tiles import TILES, Tile

WIDE = 4096
ROWS = {"many": 8192, "few": 16}
MOST = 8  # candidates of a kernel, its own tile included
KERNELS = ("contract", "expand", "outer")


def candidates(key: tuple[str, str, int, int]) -> list[Tile]:
    """The table's tile and neighbours of it that fit the shared memory, at most eight."""
    own = TILES[key]
    kernel, many, _, itemsize = key
    found = [own]
    for rows in (own.rows,) if many == "few" else (64, 128):
        for warps in (4, 8):
            for stages in (2, 3, 4):
                t = own._replace(rows=rows, warps=warps, stages=stages)
                loaded = (t.rows + t.cols) * t.depth if kernel != "expand" else t.rows * (t.depth + t.cols)
                if t not in found and loaded * itemsize * stages <= 200 * 1024 and rows * t.cols <= 4096 * warps:
                    found.append(t)
    return found[:MOST]


def work(key: tuple[str, str, int, int]) -> Callable[[], Any]:
    """One call of the kernel at its own size."""
    kernel, many, ranks, _ = key
    rows, dtype = ROWS[many], torch.bfloat16
    x, m = (torch.randn(n, WIDE, device="cuda").to(dtype) for n in (rows, ranks))
    h, b = torch.randn(rows, ranks, device="cuda").to(dtype), torch.randn(WIDE, ranks, device="cuda").to(dtype)
    gates = Gates(None, None, torch.zeros(ranks, dtype=torch.int64, device="cuda"), torch.ones(ranks, device="cuda"))
    return {
        "contract": lambda: launch.contract_gated(x, m, gates)[1],
        "expand": lambda: launch.expand(h, b, x, dtype),
        "outer": lambda: launch.outer(x, h, torch.float32),
    }[kernel]


def with_tile(key: tuple[str, str, int, int], t: Tile, call: Callable[[], Any], folder: Path) -> Callable[[], Any]:
    """``call`` under a file that holds this one tile: the way a user's file is read, too."""
    path = folder / f"{'-'.join(map(str, (*key, *t)))}.json"
    path.write_text(json.dumps({"tiles": [[list(key), list(t)]]}))

    def run() -> Any:
        os.environ["MOLORA_TILES"] = str(path)
        try:
            return call()
        finally:
            del os.environ["MOLORA_TILES"]

    return run


def tuned(folder: Path, progress: Progress) -> Iterator[tuple[tuple[str, str, int, int], Tile, float]]:
    """Each key with its fastest tile and how much faster that is than the table's."""
    keys = [k for k in TILES if k[0] in KERNELS and k[3] == 2]
    task = progress.add_task("tiles", total=len(keys))
    for key in keys:
        call = work(key)
        runs = {t: with_tile(key, t, call, folder) for t in candidates(key)}
        wanted = runs[TILES[key]]().float()
        works = {}
        for t, run in runs.items():
            try:
                off = float((run().float() - wanted).norm() / wanted.norm())
            except (triton.runtime.errors.OutOfResources, RuntimeError):
                continue  # a tile that this GPU cannot hold
            if off < 1e-2:
                works[str(tuple(t))] = run
        seconds = {n: statistics.median(v) for n, v in timed(works, 20).items()}
        best = min(runs, key=lambda t: seconds.get(str(tuple(t)), float("inf")))
        yield key, best, seconds[str(tuple(TILES[key]))] / seconds[str(tuple(best))]
        progress.advance(task)


def main(out: Path | None = None, check: bool = False, quick: bool = False) -> int:
    """Time, print, write the file and say how to use it.

    Raises:
        ConfigError: where there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise ConfigError("bench tune: got no CUDA device, expected one")
    console, name = Console(), torch.cuda.get_device_name()
    with tempfile.TemporaryDirectory() as folder, Progress(console=console) as progress:
        rows = list(tuned(Path(folder), progress))
    table = Table("kernel", "rows", "ranks", "table", "fastest here", "speed-up", title=f"Tiles on {name}")
    for key, best, gain in rows:
        table.add_row(key[0], key[1], str(key[2]), str(tuple(TILES[key])), str(tuple(best)), f"{gain:.2f}x")
    console.print(table)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    path = out or ROOT / "benchmarks" / "results" / f"tiles-{name.replace(' ', '-')}-{today}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles = [[list(key), list(best)] for key, best, gain in rows if gain > 1.02]
    path.write_text(
        json.dumps({"gpu": name, "triton": triton.__version__, "date": today, "tiles": tiles}, indent=1) + "\n"
    )
    console.print(f"written to {path}; to use it: MOLORA_TILES={path}")
    return 0
