"""The README's two tables of what works on what, from the outcomes of their cells.

    PYTHONPATH=.venv/quantised .venv/bin/python -m tests.support.table

runs every cell, in two minutes, and writes the tables into README.md. The quantisers lie where `make setup` puts them.

A cell is "yes", or "yes" or "no" with the number of a note. The tests run each cell and compare it with the README.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

from molora.errors import MoloraError
from molora.recipes import RECIPES
from tests.support.families import FAMILIES
from tests.support.features import FEATURES
from tests.support.places import ROOT
from tests.support.works import works

README = ROOT / "README.md"
BEGIN, END = "<!-- support: written by python -m tests.support.table -->", "<!-- end of support -->"

# Each refusal that a cell may end in: a part of its message, and what the table says about it.
REFUSALS = {
    "none of the targeted modules is in one": "the base has no feed-forward block of linears (its experts are fused "
    "into 3-D parameters, or it has none); take a recipe that works linear by linear",
    "a model-wide router needs one stream of tokens": "one set of gates for the whole model needs one stream of tokens",
    "the base keeps a state in its modules": "the base keeps its state in its modules, and two passes would need two; "
    "without a cache (`use_cache=False`) it works",
    "use_reentrant": "balance losses and model-wide gates would be lost",
    "the layer runs outside of the converted model's forward": "raises in the recompute, which does not know the "
    "forward it belongs to; use the model's own checkpointing",
    "forward is replaced on this": "convert or load first, then dispatch",
    "the base's experts run as one function": "a base's experts run as one function of weights that all its tokens "
    "share, and a mixture's weights depend on the token",
    "mixes experts by the token": "the weights depend on the token, so no fixed weight gives the same outputs",
}
NOTES = {
    **REFUSALS,
    "latent": 'with `exclude_modules=["kv_b_proj"]`, which runs on the whole cache at every step, past the gates',
    "fused": "with PyTorch's own scan; in training, the kernels of `mamba-ssm` read `x_proj` and `out_proj` past their "
    "experts",
    "state": "without a comparison of generation: with its recurrent state, the base itself says something else",
    "blocks": "without a comparison of generation: transformers' layer takes 8 tokens or fewer on a GPU only",
}
NUMBERS = {key: i for i, key in enumerate(NOTES, 1)}


def outcome(cell: Callable[[], str | None]) -> str:
    """What stands in the table for a cell. Any error that is no expected refusal goes through."""
    try:
        note = cell()
    except MoloraError as e:
        found = [part for part in REFUSALS if part in str(e)]
        if not found:
            raise
        return f"no ({NUMBERS[found[0]]})"
    return f"yes ({NUMBERS[note]})" if note else "yes"


def feature_cell(row: str, recipe: str) -> str:
    return outcome(lambda: FEATURES[row][1](recipe))


def family_cell(row: str, recipe: str) -> str:
    return outcome(lambda: works(recipe, row))


TABLES: dict[str, tuple[dict[str, str], Callable[[str, str], str]]] = {
    "feature": ({row: title for row, (title, _) in FEATURES.items()}, feature_cell),
    "base": ({row: family.title for row, family in FAMILIES.items()}, family_cell),
}


def render(cells: dict[tuple[str, str, str], str]) -> str:
    """Both tables and their notes, from outcomes by (table, row, recipe)."""
    out = []
    for name, (rows, _) in TABLES.items():
        out += [f"| {name} | {' | '.join(f'`{r}`' for r in RECIPES)} |", "|---" * (len(RECIPES) + 1) + "|"]
        out += [f"| {title} | {' | '.join(cells[name, row, r] for r in RECIPES)} |" for row, title in rows.items()]
        out.append("")
    return "\n".join([*out, *(f"{NUMBERS[key]}. {note[0].upper()}{note[1:]}." for key, note in NOTES.items())])


def written() -> str:
    """What stands between the marks in the README."""
    text = README.read_text()
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()


def read() -> dict[tuple[str, str, str], str]:
    """The outcomes that the README claims, by (table, row, recipe)."""
    cells, name, columns = {}, "", list[str]()
    keys = {(name, title): row for name, (rows, _) in TABLES.items() for row, title in rows.items()}
    for line in written().splitlines():
        first, *rest = [part.strip() for part in line.strip("|").split("|")]
        if first in TABLES:
            name, columns = first, [part.strip("`") for part in rest]
        elif (name, first) in keys:
            cells |= {(name, keys[name, first], r): text for r, text in zip(columns, rest, strict=True)}
    return cells


def main() -> None:
    cells = {}
    for name, (rows, cell) in TABLES.items():
        for row in rows:
            for recipe in RECIPES:
                try:
                    cells[name, row, recipe] = cell(row, recipe)
                except pytest.skip.Exception as e:
                    sys.exit(f"{row}: {e}; every cell has to run before the table is written")
            print(row, *(cells[name, row, r] for r in RECIPES), flush=True)
    text = README.read_text()
    README.write_text(re.sub(f"(?s){BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{render(cells)}\n\n{END}", text))


if __name__ == "__main__":
    main()
