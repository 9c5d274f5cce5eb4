"""What a long evaluation has finished, kept on disk as it comes, and progress bars for what is still to do."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Ledger", "Track", "bar", "quiet"]

T = TypeVar("T")
Track = Callable[[Sequence[Any], str], Iterable[Any]]


class Ledger:
    """Values by key, one JSON line each, written as soon as they are made: a run that was cut off does not make them
    again. Without a path, nothing is kept.

    ``job``: everything that the values depend on, as JSON. A file of another job is begun anew; its line may be torn.
    """

    def __init__(self, path: Path | None = None, job: Mapping[str, Any] | None = None) -> None:
        self._path, self._job, self._values = path, json.dumps(job or {}, sort_keys=True), dict[str, Any]()
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(path)
        if lines[:1] == [{"job": self._job}]:
            self._values = {line["key"]: line["value"] for line in lines[1:]}
        staged = path.with_name(path.name + ".new")
        kept = [{"job": self._job}, *({"key": k, "value": v} for k, v in self._values.items())]
        staged.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(staged, path)

    def piece(self, key: str, make: Callable[[], T]) -> T:
        """The value of ``key``, which ``make`` makes if it is not there yet; it has to survive a trip through JSON."""
        if key not in self._values:
            value = make()
            self._values[key] = value
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "value": value}) + "\n")
                    file.flush()
                    os.fsync(file.fileno())
        found: T = self._values[key]
        return found

    def close(self) -> None:
        """Everything is done: the file goes."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> list[Any]:
    """The lines up to the first that is none."""
    out: list[Any] = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            out.append(json.loads(line))
        except ValueError:
            break
    return out


def quiet(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, without a bar."""
    del what
    return items


def bar(items: Sequence[T], what: str) -> Iterable[T]:
    """The items, with a progress bar on stderr that goes when they are done; nothing where nobody looks."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return track(items, what, console=console, transient=True, disable=not console.is_terminal)
