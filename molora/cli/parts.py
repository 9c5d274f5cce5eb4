"""What recipes, data and folders are made of: every entry of every table, with its first line and its options."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from molora.data.formats import FORMATS
from molora.initialisers import INITIALISERS
from molora.interop.importers import IMPORTERS
from molora.layers.banks import BANKS
from molora.penalties import PENALTIES
from molora.routers import BALANCES, GATES, ROUTERS

__all__ = ["Part", "parts", "show_parts"]

TABLES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("router", ROUTERS),
    ("gate", GATES),
    ("balance rule", BALANCES),
    ("penalty", PENALTIES),
    ("bank", BANKS),
    ("start of experts (init_lora_weights)", INITIALISERS),
    ("data format", FORMATS),
    ("foreign format", IMPORTERS),
)


class Part(NamedTuple):
    """One entry: its table in words, its name, what it is, and its options with their defaults."""

    kind: str
    name: str
    about: str
    options: dict[str, Any]


def parts() -> list[Part]:
    """Every entry, in the order of the tables."""
    return [Part(kind, name, _about(e), _options(e)) for kind, table in TABLES for name, e in table.items()]


def _about(entry: Any) -> str:
    own = entry if inspect.isclass(entry) or inspect.ismodule(entry) else type(entry)
    text = inspect.cleandoc(own.__doc__ or "").split("\n\n")[0].replace("``", "").replace("\n", " ")
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", text)
    instead = getattr(entry, "instead", "")
    return f"{text} Not an option: {instead}" if instead else text


def _options(entry: Any) -> dict[str, Any]:
    options = getattr(entry, "options", None)
    if not dataclasses.is_dataclass(options):
        return {}
    return {f.name: f.default for f in dataclasses.fields(options) if f.name != "kind"}


def show_parts(output: Console) -> None:
    """Print a table for each kind."""
    found = parts()
    for kind, _ in TABLES:
        own = [p for p in found if p.kind == kind]
        names = ("name", "what it is", "options") if any(p.options for p in own) else ("name", "what it is")
        table = Table(*names, title=kind, title_justify="left")
        shown: dict[str, str] = {}  # options to the entry that they were written out for
        for p in own:
            options = ", ".join(f"{name}={default!r}" for name, default in p.options.items())
            first = shown.setdefault(options, p.name)
            options = options if first == p.name else f"those of {first}"
            table.add_row(*(escape(text) for text in (p.name, p.about, options)[: len(names)]))
        output.print(table)
