"""Every cell of the README's table of bases, run."""

from __future__ import annotations

import pytest

from molora.recipes import RECIPES
from tests.support import table
from tests.support.families import FAMILIES


@pytest.mark.bits
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("row", FAMILIES)
def test_a_cell_says_what_happens(row: str, recipe: str) -> None:
    """A recipe without a column yet is run; that every recipe has one is a test of its own."""
    found = table.family_cell(row, recipe)
    assert table.read().get(("base", row, recipe), found) == found
