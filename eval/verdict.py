"""What an evaluation says, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Statement", "verdict"]


class Statement(NamedTuple):
    """One answer. ``level``: "good", "warn", "bad", or "unknown" where nothing was measured."""

    key: str
    level: str
    title: str
    text: str


def verdict(document: Mapping[str, Any]) -> list[Statement]:
    """The answers for one evaluation document."""
    routing = document.get("routing") or {}
    dead = sum(len(d or ()) for d in routing.get("dead", ()))
    level = "unknown" if not routing else "bad" if dead else "good"
    return [Statement("collapse", level, "Collapse", f"{dead} experts get less than a tenth of the balanced load.")]
