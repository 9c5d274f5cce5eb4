"""Plain text: ``{"text": "..."}``. All of it is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molora.data.records import Columns, Record

__all__ = ["Text"]


class Text:
    """A row with a column of text."""

    @staticmethod
    def column(columns: Columns) -> str:
        """The column that such a row has."""
        return columns.text

    @staticmethod
    def record(line: Mapping[str, Any], columns: Columns, shared: Mapping[str, Any]) -> Record:
        """The text, as it is."""
        text = line[columns.text]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{columns.text!r}: got {text!r}, expected a non-empty string")
        return Record(text=text, **shared)

    @staticmethod
    def tiny() -> dict[str, Any]:
        """A smallest row."""
        return {"text": "A sentence."}
