"""One record of a domain: what a line of a file, a row of a table or a paragraph of a text says."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from molora.errors import ConfigError, nearest

__all__ = ["Columns", "Record", "Source", "image_of", "label_of", "source"]


@dataclass(frozen=True)
class Record:
    """Plain text, or a conversation that ends with the assistant; maybe with a class or an image.

    ``group``: what must not be split apart. ``label``: the class of a text. ``image``: the path of an image file, or
    its bytes. ``task``: which scorer judges an answer, empty for equality; ``entry``: what that scorer needs.
    ``where``: file and line, for messages.
    """

    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    group: str = ""
    task: str = ""
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False)
    label: str | int | None = None
    image: str | bytes = ""
    where: str = field(default="", compare=False)

    @property
    def prompt(self) -> tuple[Mapping[str, str], ...]:
        """The conversation up to the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer of a conversation, empty for plain text."""
        return self.messages[-1]["content"] if self.messages else ""


FORMAT = "format"  # in the metadata of a column that tells a format of rows


@dataclass(frozen=True)
class Columns:
    """Which column holds what; ``given``: the names that the user asked for, which must exist.

    A record is of one format. Who names the column of one of them does not want the others, hence "" for those.
    """

    text: str = field(default="text", metadata={FORMAT: True})
    messages: str = field(default="messages", metadata={FORMAT: True})
    label: str = "label"
    image: str = "image"
    group: str = "group"
    given: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Where the records of a domain are, and in which columns."""

    path: str
    columns: Columns = field(default_factory=Columns)


def source(value: Any) -> Source:
    """``path``, or ``{path: ..., text_column: ...}``.

    Raises:
        ConfigError: something else, or an unknown entry.
    """
    if isinstance(value, str):
        return Source(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"got {value!r}, expected a path, or a mapping with a path and names of columns")
    known = {f"{f.name}_column": f.name for f in fields(Columns) if f.name != "given"}
    faults = [f"unknown entry {k!r}{nearest(str(k), ['path', *known])}" for k in value if k not in ("path", *known)]
    faults += [f"{k}: got {v!r}, expected a string" for k, v in value.items() if not isinstance(v, str) or not v]
    if "path" not in value:
        faults.append(f"got {dict(value)!r}, expected a path in it")
    if faults:
        raise ConfigError("; ".join(faults))
    own = {known[k]: v for k, v in value.items() if k != "path"}
    formats = [f.name for f in fields(Columns) if FORMAT in f.metadata]
    if sum(name in own for name in formats) == 1:
        own = {**dict.fromkeys(formats, ""), **own}
    return Source(value["path"], Columns(**own, given=tuple(v for v in own.values() if v)))


def label_of(line: Mapping[str, Any], name: str) -> str | int:
    """The class of a line; ValueError where there is none."""
    if name not in line:
        raise ValueError(f"no {name!r}, which a classifier learns; there is {', '.join(map(repr, line))}")
    value = line[name]
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise ValueError(f"{name!r}: got {value!r}, expected a string or a whole number")
    return value


def image_of(value: Any, name: str, folder: Path) -> tuple[str | bytes, str]:
    """The image, and what tells it from others whatever folder it lies in."""
    if isinstance(value, dict):  # as `datasets` keeps images
        value = value.get("bytes") or value.get("path")
    if value is None:
        return "", ""
    if isinstance(value, bytes):
        return value, hashlib.blake2b(value, digest_size=16).hexdigest()
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name!r}: got {type(value).__name__}, expected the path of an image file, or its bytes")
    if not (folder / value).is_file():
        raise ValueError(f"{name!r}: {folder / value} does not exist; paths are relative to the file that names them")
    return str(folder / value), value
