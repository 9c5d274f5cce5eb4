"""Formats of rows. A new one is a file here with the duties of :class:`Format`, and a line in the table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from molora.data.formats.messages import Messages
from molora.data.formats.text import Text
from molora.data.records import Columns, Record, image_of, label_of

__all__ = ["FORMATS", "Format", "record", "used_columns"]


class Format(Protocol):
    """One way to write a row."""

    def column(self, columns: Columns) -> str:
        """The column that tells such a row from others; empty where the user's own columns rule the format out."""

    def record(self, line: Mapping[str, Any], columns: Columns, shared: Mapping[str, Any]) -> Record:
        """The record of a row that has the column; ``shared``: what all records hold. ValueError: what is wrong."""

    def tiny(self) -> dict[str, Any]:
        """A smallest row, for tests."""


FORMATS: dict[str, Format] = {"text": Text(), "messages": Messages()}


def used_columns(columns: Columns, needs: Collection[str]) -> set[str]:
    """Names of the columns that a record may be made of; ``label`` and ``image`` where ``needs`` has them."""
    shared = {columns.group} | {getattr(columns, name) for name in ("label", "image") if name in needs}
    return shared | {form.column(columns) for form in FORMATS.values()}


def record(line: Any, columns: Columns, needs: Collection[str], folder: Path, where: str = "") -> Record:
    """A line's record, by the one format whose column it has. ``needs``: ``label`` and ``image`` are read only if they
    stand in it.

    Paths of images are relative to ``folder``.

    Raises:
        ValueError: what is wrong with the line.
    """
    wanted = {column: form for form in FORMATS.values() if (column := form.column(columns))}
    if not isinstance(line, dict):
        names = " or ".join(map(repr, wanted))
        raise ValueError(f"got a JSON {type(line).__name__}, expected an object with {names}")
    there = [column for column in wanted if column in line]
    if len(there) != 1:
        found = ", ".join(map(repr, list(line)[:8])) or "no entries"
        names = " and ".join(map(repr, wanted))
        raise ValueError(f"got {found}, expected {'exactly one of ' if len(wanted) > 1 else ''}{names}")
    group = line.get(columns.group, "")
    if not isinstance(group, str | int):
        raise ValueError(f"{columns.group!r}: got {type(group).__name__}, expected a string")
    image, key = image_of(line.get(columns.image), columns.image, folder) if "image" in needs else ("", "")
    label = label_of(line, columns.label) if "label" in needs else None
    shared: dict[str, Any] = {"group": str(group) or key, "label": label, "image": image, "where": where}
    return wanted[there[0]].record(line, columns, shared)
