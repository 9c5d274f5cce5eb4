"""Every cell of the README's table of features, run; and the two tables are whole."""

from __future__ import annotations

import pytest

from molora.recipes import RECIPES
from tests.support import table
from tests.support.features import FEATURES


@pytest.mark.bits
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("row", FEATURES)
def test_a_cell_says_what_happens(row: str, recipe: str) -> None:
    """A recipe without a column yet is run; that every recipe has one is a test of its own."""
    found = table.feature_cell(row, recipe)
    assert table.read().get(("feature", row, recipe), found) == found


def test_the_tables_hold_every_row_recipe_and_note() -> None:
    assert table.written() == table.render(table.read()), "run: python -m tests.support.table"


def test_an_error_that_nobody_expected_is_no_cell() -> None:
    def cell() -> None:
        raise ValueError("none of the targeted modules is in one, says somebody else")

    with pytest.raises(ValueError, match="somebody else"):
        table.outcome(cell)
