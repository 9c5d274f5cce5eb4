"""Conversations: ``{"messages": [{"role": "user", "content": "..."}, ...]}``. The assistant's turns are learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from molora.data.records import Columns, Record

__all__ = ["Messages"]

ROLES = ("system", "user", "assistant", "tool")


class Messages:
    """A row with a list of turns, each a role and a text; the last one is an answer of the assistant."""

    @staticmethod
    def column(columns: Columns) -> str:
        """The column that such a row has."""
        return columns.messages

    @staticmethod
    def record(line: Mapping[str, Any], columns: Columns, shared: Mapping[str, Any]) -> Record:
        """The turns, with their role and content alone."""
        name, value = columns.messages, line[columns.messages]
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name!r}: got {value!r}, expected a non-empty list")
        for i, m in enumerate(value):
            if not isinstance(m, dict) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
                raise ValueError(
                    f"{name!r}[{i}]: got {m!r}, expected 'role' ({', '.join(ROLES)}) and 'content' as text"
                )
        if value[-1]["role"] != "assistant" or not value[-1]["content"].strip():
            raise ValueError(
                f"{name!r}: the last one must be a non-empty answer of the assistant, it is what is learned"
            )
        return Record(messages=tuple({"role": m["role"], "content": m["content"]} for m in value), **shared)

    @staticmethod
    def tiny() -> dict[str, Any]:
        """A smallest row."""
        return {"messages": [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]}
