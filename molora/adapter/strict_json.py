"""JSON from files that strangers made: bounded before it is parsed, nothing that two readers could read differently."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NoReturn

from molora.errors import AdapterError

__all__ = ["open_regular", "parse_object", "read_object"]

MAX_DEPTH = 12  # the deepest config nests 6
MAX_KEY = 1000  # characters
MAX_DIGITS = 18  # every such integer fits 64 bits
_HUB_BLOB = re.compile(r"((?:\.\./){2,})blobs/[0-9a-f]{40}([0-9a-f]{24})?")


def open_regular(path: Path) -> int:
    """A descriptor of the plain file ``path``, for reading. Never follows a link, never opens a device or a pipe.

    One link is accepted: the hub cache's ``snapshots/<revision>/<name> -> ../../blobs/<hash>``, also from a folder
    within the revision, to a plain file there: the same repository's.

    Raises:
        FileNotFoundError: when there is nothing of that name.
        AdapterError: when it is not a plain file.
    """
    mode = os.lstat(path).st_mode
    if stat.S_ISLNK(mode):
        target, here = os.readlink(path), path.absolute()
        blob = _HUB_BLOB.fullmatch(target)
        up = len(blob[1]) // 3 if blob else 0
        if not blob or up >= len(here.parents) or here.parents[up - 1].name != "snapshots":
            raise AdapterError(
                f"{path}: got a link to {target!r}, expected a plain file; copy the file into the folder"
            )
        path = here.parents[up] / target[3 * up :]
        mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        raise AdapterError(f"{path}: got something that is not a plain file (mode {oct(mode)}), expected a plain file")
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def read_object(path: Path, limit: int, *, max_keys: int = 1 << 20) -> dict[str, Any]:
    """The JSON object in the plain file ``path`` of at most ``limit`` bytes, with ``max_keys`` entries an object.

    Raises:
        FileNotFoundError: when the file is missing.
        AdapterError: for anything that is not strict JSON, with the file and the fault.
    """
    with open(open_regular(path), "rb") as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise AdapterError(f"{path}: got more than {limit:,} bytes, expected less; this is not an adapter's config")
    return parse_object(raw, str(path), max_keys=max_keys)


def parse_object(raw: bytes, what: str, *, max_keys: int = 1 << 20) -> dict[str, Any]:
    """``raw`` as a JSON object: UTF-8 without BOM, no repeated key, no NaN, no overflow, depth and digits bounded.

    Raises:
        AdapterError: naming ``what`` and the fault.
    """
    try:
        if raw.startswith(b"\xef\xbb\xbf"):
            raise ValueError("it starts with a byte order mark")
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=functools.partial(_unique, max_keys),
            parse_constant=_constant,
            parse_int=_int,
            parse_float=_float,
        )
        _check(value)
    except (ValueError, RecursionError) as e:
        fault = "it nests too deep" if isinstance(e, RecursionError) else str(e)[:300]
        raise AdapterError(f"{what}: got JSON that cannot be trusted ({fault}), expected plain UTF-8 JSON") from e
    if not isinstance(value, dict):
        raise AdapterError(f"{what}: got a JSON {type(value).__name__}, expected an object with named entries")
    return value


def _unique(max_keys: int, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > max_keys:
        raise ValueError(f"an object has {len(pairs)} entries, more than {max_keys}")
    out: dict[str, Any] = {}
    for key, value in pairs:
        if key in out or len(key) > MAX_KEY:
            raise ValueError(f"the key {key[:100]!r} {'stands twice' if key in out else 'is too long'}")
        out[key] = value
    return out


def _constant(text: str) -> NoReturn:
    raise ValueError(f"it holds {text}, which is not JSON")


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _check(value: Any) -> None:
    """Bounded depth, and text that can be written out again (a lone surrogate cannot). Walks without recursion."""
    layer = [value]
    for _ in range(MAX_DEPTH):
        children: list[Any] = []
        for v in layer:
            if isinstance(v, str):
                v.encode("utf-8")
            elif isinstance(v, dict):
                children += v
                children += v.values()
            elif isinstance(v, list):
                children += v
        if not children:
            return
        layer = children
    raise ValueError(f"it nests deeper than {MAX_DEPTH}")
