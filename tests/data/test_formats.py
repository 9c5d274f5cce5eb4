"""Formats of rows: each entry of the table is read from every container, and a new one is one entry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from molora.data.formats import FORMATS
from molora.data.records import Columns, Record, Source
from molora.data.sources import read_source
from molora.errors import ConfigError

ROWS = 3


def jsonl(rows: list[Any], path: Path) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(rows: list[Any], path: Path) -> Path:
    pa = pytest.importorskip("pyarrow", reason="the extra `train` installs pyarrow")
    import pyarrow.parquet as pq

    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


CONTAINERS = {"jsonl": jsonl, "parquet": parquet}


class Answered:
    """A question and its answer in one column."""

    def column(self, columns: Columns) -> str:
        return "response" if columns.text and columns.messages else ""

    def record(self, line: Mapping[str, Any], columns: Columns, shared: Mapping[str, Any]) -> Record:
        question, _, answer = str(line["response"]).partition("=>")
        if not answer:
            raise ValueError("'response': expected question => answer")
        turns = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        return Record(messages=turns, **shared)

    def tiny(self) -> dict[str, Any]:
        return {"response": "2 + 2=>4"}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table with a format more."""
    monkeypatch.setitem(FORMATS, "answered", Answered())


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("name", [*FORMATS, "answered"])
def test_the_smallest_row_is_read(name: str, container: str, tmp_path: Path) -> None:
    rows = [{**FORMATS[name].tiny(), "group": f"g{i}"} for i in range(ROWS)]
    found = read_source(Source(str(CONTAINERS[container](rows, tmp_path / "rows"))))
    assert [r.group for r in found] == ["g0", "g1", "g2"]
    assert all(bool(r.text) != bool(r.messages) for r in found)


@pytest.mark.usefixtures("table")
def test_errors_name_the_line_and_every_column_that_would_do(tmp_path: Path) -> None:
    rows = [{"text": "a"}, {"prompt": "b"}, {"response": "no arrow"}, {"text": "a", "response": "b=>c"}]
    with pytest.raises(ConfigError) as e:
        read_source(Source(str(jsonl(rows, tmp_path / "rows"))))
    wrong = str(e.value).splitlines()
    assert "rows.jsonl:2" in wrong[0]
    assert "got 'prompt', expected exactly one of 'text' and 'messages' and 'response'" in wrong[0]
    assert "rows.jsonl:3" in wrong[1]
    assert "expected question => answer" in wrong[1]
    assert "rows.jsonl:4" in wrong[2]
    assert len(wrong) == 3


@pytest.mark.usefixtures("table")
def test_a_format_may_step_back_for_the_users_own_columns(tmp_path: Path) -> None:
    path = jsonl([{"body": "a", "response": "b=>c"}], tmp_path / "rows")
    found = read_source(Source(str(path), Columns(text="body", messages="", given=("body",))))
    assert [r.text for r in found] == ["a"]
