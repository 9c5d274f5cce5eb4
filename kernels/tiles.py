"""Tile sizes of the Triton kernels: static tables, so that the same shapes always run the same code.

Nothing is timed while a model runs: another tile is another order of summation, hence other bits, and a timing under
CUDA graph capture is an error. Who wants other tiles for a GPU makes a file of them once with ``molora bench tune``
and names it in the environment variable ``MOLORA_TILES``.

Every tile here is compiled for three generations of GPUs by a test, which looks for register spills, for tensor-core
instructions, and that shared memory fits the smallest of them (sm_80: 163 KiB a program).
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from molora.errors import ConfigError

__all__ = ["FUSED_RANK", "MAX_RANK", "RIDGE", "TILES", "Tile", "ceil_div", "rank_block", "splits", "tile", "walk"]

MAX_RANK = 4096  # total rank that the concat kernels take; a sum this wide belongs to the sorted kernels anyway
RIDGE = 236  # products per byte at which an H100 leaves the limit of its memory (790e12 / 3.35e12); an H200: 165
FUSED_RANK = 64  # up to which the gate follows in the program of the product; a wider tile spills its registers
PROGRAMS = 264  # two for each of the 132 multiprocessors of an H100 or H200: enough to hide latency
FEW = 64  # rows below which a tile of 16 rows wastes less than one of 128


class Tile(NamedTuple):
    """``rows`` x ``cols`` of the result a program makes, ``depth`` of the sum at a step."""

    rows: int
    cols: int
    depth: int
    warps: int
    stages: int


# (kernel, "few" or "many" rows, block of ranks, bytes of an element) -> Tile. Ranks are the columns of contract and
# outer and the depth of expand. float32 sums run without tensor cores, so that their tiles are small.
TILES: dict[tuple[str, str, int, int], Tile] = {
    ("contract", "many", 16, 2): Tile(128, 16, 128, 4, 4),
    ("contract", "many", 32, 2): Tile(128, 32, 128, 4, 4),
    ("contract", "many", 64, 2): Tile(64, 64, 128, 4, 3),
    ("contract", "many", 128, 2): Tile(128, 128, 64, 8, 4),
    ("contract", "few", 16, 2): Tile(16, 16, 256, 4, 3),
    ("contract", "few", 32, 2): Tile(16, 32, 256, 4, 3),
    ("contract", "few", 64, 2): Tile(16, 64, 128, 4, 3),
    ("contract", "few", 128, 2): Tile(16, 128, 128, 4, 3),
    ("contract", "many", 16, 4): Tile(32, 16, 32, 4, 2),
    ("contract", "many", 32, 4): Tile(32, 32, 32, 4, 2),
    ("contract", "many", 64, 4): Tile(32, 64, 32, 4, 2),
    ("contract", "many", 128, 4): Tile(32, 128, 16, 8, 2),
    ("contract", "few", 16, 4): Tile(16, 16, 32, 4, 2),
    ("contract", "few", 32, 4): Tile(16, 32, 32, 4, 2),
    ("contract", "few", 64, 4): Tile(16, 64, 32, 4, 2),
    ("contract", "few", 128, 4): Tile(16, 128, 16, 4, 2),
    ("expand", "many", 16, 2): Tile(128, 128, 16, 8, 3),
    ("expand", "many", 32, 2): Tile(128, 128, 32, 8, 3),
    ("expand", "many", 64, 2): Tile(128, 128, 64, 8, 3),
    ("expand", "many", 128, 2): Tile(128, 128, 128, 8, 2),
    ("expand", "few", 16, 2): Tile(16, 128, 16, 4, 2),
    ("expand", "few", 32, 2): Tile(16, 128, 32, 4, 2),
    ("expand", "few", 64, 2): Tile(16, 128, 64, 4, 2),
    ("expand", "few", 128, 2): Tile(16, 128, 128, 4, 2),
    ("expand", "many", 16, 4): Tile(32, 64, 16, 4, 2),
    ("expand", "many", 32, 4): Tile(32, 64, 32, 4, 2),
    ("expand", "many", 64, 4): Tile(32, 64, 32, 4, 2),
    ("expand", "many", 128, 4): Tile(32, 64, 32, 4, 2),
    ("expand", "few", 16, 4): Tile(16, 64, 16, 4, 2),
    ("expand", "few", 32, 4): Tile(16, 64, 32, 4, 2),
    ("expand", "few", 64, 4): Tile(16, 64, 32, 4, 2),
    ("expand", "few", 128, 4): Tile(16, 64, 32, 4, 2),
    ("outer", "many", 16, 2): Tile(128, 16, 64, 4, 3),
    ("outer", "many", 32, 2): Tile(128, 32, 64, 4, 3),
    ("outer", "many", 64, 2): Tile(128, 64, 64, 4, 3),
    ("outer", "many", 128, 2): Tile(128, 128, 64, 8, 3),
    ("outer", "many", 16, 4): Tile(32, 16, 32, 4, 2),
    ("outer", "many", 32, 4): Tile(32, 32, 32, 4, 2),
    ("outer", "many", 64, 4): Tile(32, 64, 32, 4, 2),
    ("outer", "many", 128, 4): Tile(32, 128, 16, 8, 2),
    ("gate", "many", 16, 4): Tile(64, 16, 0, 4, 1),
    ("gate", "many", 32, 4): Tile(64, 32, 0, 4, 1),
    ("gate", "many", 64, 4): Tile(32, 64, 0, 4, 1),
    ("gate", "many", 128, 4): Tile(16, 128, 0, 4, 1),
    # glu: tokens x columns of F a step, over all ranks
    ("glu", "many", 16, 2): Tile(64, 32, 16, 4, 2),
    ("glu", "many", 32, 2): Tile(64, 32, 32, 4, 2),
    ("glu", "many", 64, 2): Tile(32, 64, 64, 8, 2),
    ("glu", "many", 128, 2): Tile(32, 64, 128, 8, 2),
    ("glu", "many", 16, 4): Tile(16, 32, 16, 4, 1),
    ("glu", "many", 32, 4): Tile(16, 32, 32, 4, 1),
    ("glu", "many", 64, 4): Tile(16, 32, 64, 4, 1),
    ("glu", "many", 128, 4): Tile(16, 32, 128, 4, 1),
    ("glu_rows", "many", 16, 2): Tile(64, 16, 16, 4, 2),
    ("glu_rows", "many", 32, 2): Tile(64, 16, 32, 4, 2),
    ("glu_rows", "many", 64, 2): Tile(32, 64, 64, 8, 2),
    ("glu_rows", "many", 128, 2): Tile(32, 32, 128, 8, 2),
    ("glu_rows", "many", 16, 4): Tile(16, 32, 16, 4, 1),
    ("glu_rows", "many", 32, 4): Tile(16, 32, 32, 4, 1),
    ("glu_rows", "many", 64, 4): Tile(16, 32, 64, 4, 1),
    ("glu_rows", "many", 128, 4): Tile(16, 32, 128, 4, 1),
    ("glu_columns", "many", 16, 2): Tile(32, 64, 16, 4, 2),
    ("glu_columns", "many", 32, 2): Tile(32, 64, 32, 4, 2),
    ("glu_columns", "many", 64, 2): Tile(64, 32, 64, 8, 2),
    ("glu_columns", "many", 128, 2): Tile(32, 32, 128, 8, 2),
    ("glu_columns", "many", 16, 4): Tile(16, 32, 16, 4, 1),
    ("glu_columns", "many", 32, 4): Tile(16, 32, 32, 4, 1),
    ("glu_columns", "many", 64, 4): Tile(16, 32, 64, 4, 1),
    ("glu_columns", "many", 128, 4): Tile(16, 32, 128, 4, 1),
    ("grouped_shrink", "many", 16, 2): Tile(64, 16, 128, 4, 4),
    ("grouped_shrink", "many", 32, 2): Tile(64, 32, 128, 4, 4),
    ("grouped_shrink", "many", 64, 2): Tile(64, 64, 64, 8, 4),
    ("grouped_shrink", "many", 128, 2): Tile(64, 128, 64, 8, 4),
    ("grouped_shrink", "few", 16, 2): Tile(16, 16, 256, 4, 3),
    ("grouped_shrink", "few", 32, 2): Tile(16, 32, 128, 4, 4),
    ("grouped_shrink", "few", 64, 2): Tile(16, 64, 128, 4, 3),
    ("grouped_shrink", "few", 128, 2): Tile(16, 128, 128, 4, 3),
    ("grouped_shrink", "many", 16, 4): Tile(32, 16, 32, 4, 2),
    ("grouped_shrink", "many", 32, 4): Tile(32, 32, 32, 4, 2),
    ("grouped_shrink", "many", 64, 4): Tile(32, 64, 32, 4, 2),
    ("grouped_shrink", "many", 128, 4): Tile(32, 128, 16, 8, 2),
    ("grouped_shrink", "few", 16, 4): Tile(16, 16, 32, 4, 2),
    ("grouped_shrink", "few", 32, 4): Tile(16, 32, 32, 4, 2),
    ("grouped_shrink", "few", 64, 4): Tile(16, 64, 32, 4, 2),
    ("grouped_shrink", "few", 128, 4): Tile(16, 128, 16, 4, 2),
    ("grouped_expand", "many", 16, 2): Tile(64, 128, 16, 4, 2),
    ("grouped_expand", "many", 32, 2): Tile(64, 128, 32, 4, 2),
    ("grouped_expand", "many", 64, 2): Tile(64, 128, 64, 4, 2),
    ("grouped_expand", "many", 128, 2): Tile(64, 128, 128, 8, 2),
    ("grouped_expand", "few", 16, 2): Tile(16, 128, 16, 4, 2),
    ("grouped_expand", "few", 32, 2): Tile(16, 128, 32, 4, 2),
    ("grouped_expand", "few", 64, 2): Tile(16, 128, 64, 4, 2),
    ("grouped_expand", "few", 128, 2): Tile(16, 128, 128, 8, 2),
    ("grouped_expand", "many", 16, 4): Tile(32, 64, 16, 4, 2),
    ("grouped_expand", "many", 32, 4): Tile(32, 64, 32, 4, 2),
    ("grouped_expand", "many", 64, 4): Tile(32, 64, 32, 4, 2),
    ("grouped_expand", "many", 128, 4): Tile(32, 64, 32, 4, 2),
    ("grouped_expand", "few", 16, 4): Tile(16, 64, 16, 4, 2),
    ("grouped_expand", "few", 32, 4): Tile(16, 64, 32, 4, 2),
    ("grouped_expand", "few", 64, 4): Tile(16, 64, 32, 4, 2),
    ("grouped_expand", "few", 128, 4): Tile(16, 64, 32, 4, 2),
    ("grouped_outer", "many", 16, 2): Tile(128, 16, 64, 4, 3),
    ("grouped_outer", "many", 32, 2): Tile(128, 32, 64, 4, 3),
    ("grouped_outer", "many", 64, 2): Tile(128, 64, 64, 4, 3),
    ("grouped_outer", "many", 128, 2): Tile(128, 128, 64, 8, 3),
    ("grouped_outer", "many", 16, 4): Tile(32, 16, 32, 4, 2),
    ("grouped_outer", "many", 32, 4): Tile(32, 32, 32, 4, 2),
    ("grouped_outer", "many", 64, 4): Tile(32, 64, 32, 4, 2),
    ("grouped_outer", "many", 128, 4): Tile(32, 128, 16, 8, 2),
}


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def rank_block(total_rank: int) -> int:
    """The block of ranks: the next power of two, at least 16 (the depth of a tensor-core step), at most 128."""
    return min(128, max(16, 1 << (total_rank - 1).bit_length()))


def tile(kernel: str, rows: int, total_rank: int, itemsize: int) -> Tile:
    """The tile for ``rows`` rows of elements of ``itemsize`` bytes; from the file of ``MOLORA_TILES`` if it has one."""
    block = rank_block(total_rank)
    many = "few" if rows < FEW and (kernel, "few", block, itemsize) in TILES else "many"
    key = (kernel, many, block, itemsize)
    return _tuned(os.environ.get("MOLORA_TILES", "")).get(key) or TILES[key]


def splits(tiles: int, steps: int, most: int) -> int:
    """Into how many parts a sum of ``steps`` steps is cut so that ``tiles`` results keep the GPU busy."""
    return max(1, min(most, steps, PROGRAMS // max(tiles, 1)))


def walk(row_tiles: int, strips: int) -> int:
    """Row tiles that one program of a strip visits: about three programs for each multiprocessor in all."""
    return max(1, row_tiles * strips // (3 * PROGRAMS // 2))


@functools.cache
def _tuned(path: str) -> dict[tuple[str, str, int, int], Tile]:
    """The tiles of a file written by ``molora bench tune``.

    Raises:
        ConfigError: for a file that is not one, or that names an unknown kernel.
    """
    if not path:
        return {}
    try:
        rows: list[Any] = json.loads(Path(path).read_text(encoding="utf-8"))["tiles"]
        found = {(str(k), str(n), int(r), int(b)): Tile(*(int(v) for v in t)) for (k, n, r, b), t in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"MOLORA_TILES: got {path}, which cannot be read as tiles ({error}); expected a file of `molora bench tune`"
        ) from error
    if strange := sorted(set(found) - set(TILES)):
        raise ConfigError(f"MOLORA_TILES: {path} has tiles for {strange[0]}, expected kernels of {__name__}.TILES")
    return found
