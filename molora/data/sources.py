"""Where records come from: JSON lines, Parquet tables, texts, folders of these, and what the package datasets loads.

A line or row has a column ``text``, or ``messages`` (``[{"role": "user", "content": "..."}, ..., {"role": "assistant",
...}]``). An optional ``group`` names what must stay on one side of the split (a document, a problem). Classifiers
learn ``label``, vision-language models see ``image``. A text file has one record a paragraph; blank lines part them.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from molora.data.formats import record, used_columns
from molora.data.records import Columns, Record, Source
from molora.errors import ConfigError, nearest
from molora.extras import need

__all__ = ["HUB", "read_jsonl", "read_lines", "read_source"]

HUB = "hf:"  # hf:name[:config][:split], what datasets.load_dataset takes
FAULTS_SHOWN = 5
NAMES_SHOWN = 12
JSONL = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
ENDINGS = (*JSONL, ".parquet", ".txt")

KINDS = f"a file of JSON lines, .parquet or .txt, a folder of these, or {HUB}<name>"

T = TypeVar("T")
Rows = Iterable[tuple[str, Any]]  # where it stands, and the row, or the ValueError that it ended in


def read_source(source: Source, needs: Collection[str] = ()) -> list[Record]:
    """All records of a file, of a folder's files (in the order of their paths), or of a ``hf:`` data set.

    ``needs``: ``label`` and ``image`` are read only if they stand in it.

    Raises:
        ConfigError: missing, unreadable or empty; an unknown column; or the first bad lines, with file and number.
    """
    if source.path.startswith(HUB):
        return _hub(source, needs)
    path = Path(source.path)
    if not path.is_dir():
        return _file(path, source.columns, needs)
    files = sorted(f for f in path.rglob("*") if f.name.endswith(ENDINGS) and f.is_file())
    files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]  # hidden copies
    if not files:
        raise ConfigError(f"{path} holds no file that ends with {', '.join(ENDINGS)}")
    return [r for f in files for r in _file(f, source.columns, needs)]


def _file(path: Path, columns: Columns, needs: Collection[str]) -> list[Record]:
    if path.name.endswith(".parquet"):
        return _parquet(_existing(path), columns, needs)
    if path.name.endswith(".txt"):
        return _gather(str(path), _paragraphs(_existing(path)), columns, needs, path.parent)
    return read_jsonl(path, columns, needs)


def read_jsonl(path: Path | str, columns: Columns | None = None, needs: Collection[str] = ()) -> list[Record]:
    """Read one file of JSON lines, gzipped if its name ends with ``.gz``.

    Raises:
        ConfigError: file missing, unreadable or empty; or, for the first bad lines, file, line number and fault.
    """
    path = _existing(Path(path))
    return _gather(str(path), _lines(path), columns or Columns(), needs, path.parent)


def read_lines(path: Path | str, parse: Callable[[Any, str], T]) -> list[T]:
    """What ``parse`` makes of each JSON line of a file and of where it stands; it raises ValueError for a bad one.

    Raises:
        ConfigError: as :func:`read_jsonl`.
    """
    path = _existing(Path(path), "a file of JSON lines")
    found, faults = _parsed(_lines(path), parse)
    return _whole(str(path), found, faults)


def _existing(path: Path, expected: str = KINDS) -> Path:
    if path.is_file():
        return path
    what = "is a folder" if path.is_dir() else "does not exist"
    raise ConfigError(f"{path} {what}; expected {expected}")


def _bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as e:
            raise ConfigError(f"{path} cannot be unpacked: {e}") from e
    return raw.removeprefix(b"\xef\xbb\xbf")


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_bytes(path).split(b"\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except ValueError as e:
                yield f"{path}:{number}", e


def _paragraphs(path: Path) -> Iterator[tuple[str, Any]]:
    start, lines = 1, list[str]()
    for number, raw in enumerate([*_bytes(path).split(b"\n"), b""], 1):
        try:
            line = raw.decode().rstrip("\r")
        except UnicodeDecodeError as e:
            yield f"{path}:{number}", e
            line = ""
        if line.strip():
            start = start if lines else number
            lines.append(line)
        elif lines:
            yield f"{path}:{start}", {"text": "\n".join(lines)}
            lines = []


def _parquet(path: Path, columns: Columns, needs: Collection[str]) -> list[Record]:
    parquet = need("pyarrow.parquet", "train", str(path))
    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
        rows = file.read(columns=[n for n in names if n in used_columns(columns, needs)]).to_pylist()
    except (OSError, ValueError) as e:  # pyarrow's errors are among them
        raise ConfigError(f"{path} is not a readable Parquet file: {_first_line(e)}") from e
    return _gather(str(path), _table(str(path), rows), columns, needs, path.parent, names)


def _hub(source: Source, needs: Collection[str]) -> list[Record]:
    name, config, split = (*source.path.removeprefix(HUB).split(":", 2), "", "")[:3]
    datasets = need("datasets", "train", source.path)
    quiet = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        table = datasets.load_dataset(name, config or None, split=split or "train")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as e:
        raise ConfigError(
            f"{source.path} cannot be loaded: {_first_line(e)}; expected {HUB}name, {HUB}name:config or "
            f"{HUB}name:config:split of a data set that is in the cache or can be reached"
        ) from e
    finally:
        if not quiet:
            datasets.enable_progress_bars()
    names = list(table.column_names)
    table = table.select_columns([n for n in names if n in used_columns(source.columns, needs)])
    for n, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(n, datasets.Image(decode=False))
    classes = {n: f.names for n, f in table.features.items() if isinstance(f, datasets.ClassLabel)}

    def named(column: str, value: Any) -> Any:
        known = classes.get(column, ())
        return known[value] if value in range(len(known)) else value  # -1 stands for a class that was kept secret

    rows = ({k: named(k, v) for k, v in row.items()} for row in table)
    return _gather(source.path, _table(source.path, rows), source.columns, needs, Path(), names)


def _table(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """A table has every column in every row, so an empty cell is what a missing entry is in JSON."""
    for number, row in enumerate(rows, 1):
        yield f"{name}: row {number}", {k: v for k, v in row.items() if v is not None}


def _gather(
    name: str, rows: Rows, columns: Columns, needs: Collection[str], folder: Path, names: Iterable[str] = ()
) -> list[Record]:
    seen = dict.fromkeys(names)

    def parse(row: Any, where: str) -> Record:
        seen.update(dict.fromkeys(row if isinstance(row, dict) else ()))
        return record(row, columns, needs, folder, where)

    records, faults = _parsed(rows, parse)
    missing = [c for c in columns.given if c not in seen] if seen else []
    if missing:
        there = ", ".join(map(repr, list(seen)[:NAMES_SHOWN]))
        raise ConfigError("\n".join(f"{name}: no column {c!r}; there is {there}{nearest(c, seen)}" for c in missing))
    return _whole(name, records, faults)


def _parsed(rows: Rows, parse: Callable[[Any, str], T]) -> tuple[list[T], list[str]]:
    """What could be parsed, and what is wrong with the rest."""
    found, faults = list[T](), list[str]()
    for where, row in rows:
        try:
            if isinstance(row, ValueError):
                raise row
            found.append(parse(row, where))
        except ValueError as e:
            faults.append(f"{where}: {_fault(e)}")
    return found, faults


def _whole(name: str, found: list[T], faults: list[str]) -> list[T]:
    if faults:
        more = f"\n... and {len(faults) - FAULTS_SHOWN} more lines" if len(faults) > FAULTS_SHOWN else ""
        raise ConfigError("\n".join(faults[:FAULTS_SHOWN]) + more)
    if not found:
        raise ConfigError(f"{name} has no records; expected at least one line, row or paragraph")
    return found


def _fault(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return str(error)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
