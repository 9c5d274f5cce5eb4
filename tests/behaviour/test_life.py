"""Every entry of every table lives its whole life on the smallest config that uses it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import life


@pytest.mark.parametrize(("table", "name", "stage"), life.cases())
def test_an_entry_lives(table: str, name: str, stage: str, tmp_path: Path) -> None:
    life.STAGES[stage](life.smallest(table, name), tmp_path)
