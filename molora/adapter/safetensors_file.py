"""safetensors files, read and written in one pass each: the digest, the bounds and the bytes of one open file.

The library reads by path, so what was checked need not be what is loaded; it accepts repeated keys; and it reports a
full disk as a format error. The format is small: 8 bytes of header length, a JSON header, the tensors end to end.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from molora.adapter.strict_json import open_regular, parse_object
from molora.errors import AdapterError, CheckpointError

__all__ = ["DTYPES", "Entry", "TensorFile", "write_tensors"]

CHUNK = 1 << 20  # bytes hashed at a time
# In the library's order: it stores wide types first, so that every tensor starts aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its shape, dtype, and where its bytes start behind the header."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file. Stays the same file when another is put in its place; closed with the last reference.

    Opening reads the header alone and checks it whole: size, keys, dtypes, shapes, and that the data fill the file
    exactly. ``entries``: name to :class:`Entry`, in the order of the data.

    Raises:
        FileNotFoundError: when the file is missing.
        AdapterError: naming the file and the fault.
    """

    def __init__(self, path: Path, *, header_limit: int) -> None:
        self.path = path
        self._fd = open_regular(path)
        weakref.finalize(self, os.close, self._fd)
        self.size = os.fstat(self._fd).st_size
        length = int.from_bytes(self._read(0, min(8, self.size)), "little")
        if self.size < 8 or length > self.size - 8:
            raise self._fault(f"a header of {length:,} bytes in a file of {self.size:,}")
        if length > header_limit:
            raise self._fault(f"a header of {length:,} bytes, where {header_limit:,} hold every expected tensor")
        self._data = 8 + length
        self.entries = self._parse(self._read(8, length))

    def _fault(self, got: str) -> AdapterError:
        return AdapterError(
            f"{self.path}: got {got}; expected a whole safetensors file. Fetch or save the adapter again"
        )

    def _parse(self, raw: bytes) -> dict[str, Entry]:
        if not raw.startswith(b"{"):
            raise self._fault("a header that is not a JSON object")
        header = parse_object(raw, f"{self.path}: header")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._fault("metadata that are not text")
        entries, end = {}, 0
        for name, value in sorted(header.items(), key=lambda item: _offsets(item[1])):
            entry = _entry(value)
            if entry is None or _offsets(value) != (end, end + entry.nbytes):
                raise self._fault(
                    f"a broken entry for {name[:200]!r}: {str(value)[:200]}, with data before it up to {end}"
                )
            entries[name], end = entry, end + entry.nbytes
        if end != self.size - self._data:
            raise self._fault(f"{self.size - self._data:,} bytes of data for tensors of {end:,}")
        return entries

    def _read(self, start: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._fill(memoryview(buffer), start)
        return bytes(buffer)

    def _fill(self, view: memoryview, start: int) -> None:
        while view:
            done = os.preadv(self._fd, [view[: 1 << 30]], start)
            if not done:
                raise self._fault("a file that became shorter while it was read")
            view, start = view[done:], start + done

    def sha256(self) -> str:
        """Hexadecimal digest of the whole file."""
        digest = hashlib.sha256()
        for start in range(0, self.size, CHUNK):
            digest.update(self._read(start, min(CHUNK, self.size - start)))
        return digest.hexdigest()

    def load(self, *, allow_nan: bool = False) -> tuple[dict[str, Tensor], str]:
        """All tensors, on the CPU, and the digest of the very bytes that they were made from.

        Raises:
            AdapterError: for NaN or infinite values, unless ``allow_nan``; when the file shrank meanwhile.
        """
        digest = hashlib.sha256(self._read(0, self._data))
        tensors = {name: self._tensor(name, allow_nan, digest.update) for name in self.entries}
        return tensors, digest.hexdigest()

    def take(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Some of the tensors; the rest of the file, which may be a whole model, is not read.

        Raises:
            AdapterError: for NaN or infinite values; when the file shrank meanwhile.
        """
        return {name: self._tensor(name, False, lambda _: None) for name in names}

    def _tensor(self, name: str, allow_nan: bool, seen: Callable[[memoryview], object]) -> Tensor:
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        if entry.nbytes:
            view = _bytes(tensor)
            self._fill(view, self._data + entry.start)
            seen(view)
        if entry.dtype.is_floating_point and not allow_nan and not bool(tensor.isfinite().all()):
            raise AdapterError(f"{self.path}: {name} holds NaN or infinite values, expected finite weights")
        return tensor


def _offsets(value: Any) -> tuple[int, int]:
    """A header entry's offsets; (-1, -1), which never fits, for anything else."""
    offsets = value.get("data_offsets") if isinstance(value, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets):
        return offsets[0], offsets[1]
    return -1, -1


def _entry(value: Any) -> Entry | None:
    """A header entry, or None when it is not one."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return None
    shape, dtype = value["shape"], value["dtype"]
    if not isinstance(dtype, str) or dtype not in DTYPES or not isinstance(shape, list) or len(shape) > 8:
        return None
    if not all(type(n) is int and 0 <= n < 1 << 40 for n in shape):
        return None
    return Entry(tuple(shape), DTYPES[dtype], _offsets(value)[0])


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> str:
    """Write ``tensors`` as safetensors, byte for byte as the library does, and return the file's sha256.

    One tensor at a time goes to the CPU; the order depends on names and dtypes only.

    Raises:
        CheckpointError: for a tensor without storage, of an unsupported dtype, or with NaN or infinite values.
    """
    ranks = {dtype: i for i, dtype in enumerate(NAMES)}
    for name, t in tensors.items():
        if t.is_meta or t.layout is not torch.strided or t.dtype not in NAMES:
            raise CheckpointError(
                f"{name}: got a {t.dtype} tensor ({t.layout}, {t.device}), expected plain numbers in memory"
            )
        if t.is_floating_point() and not bool(t.isfinite().all()):
            raise CheckpointError(
                f"{name}: holds NaN or infinite values; nothing was saved. The last saved adapter still stands"
            )
    order = sorted(tensors, key=lambda name: (ranks[tensors[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        t = tensors[name]
        header[name] = {"dtype": NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for part in (len(text).to_bytes(8, "little"), text):
        digest.update(part)
        file.write(part)
    for name in order:
        view = _bytes(tensors[name].detach().cpu().contiguous()) if tensors[name].numel() else memoryview(b"")
        digest.update(view)
        file.write(view)
    return digest.hexdigest()
