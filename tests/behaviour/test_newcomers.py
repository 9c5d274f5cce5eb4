"""A recipe that enters the table is tested without a change of any test: two of them go through the matrix."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support import tiny
from tests.support.newcomers import NEWCOMERS
from tests.support.places import ROOT

OTHERS = [name for name in tiny.BUILDERS if name != "llama"]
FILES = ("conversion", "generation", "invariances", "metamorphic", "training_steps")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", NEWCOMERS)
def test_a_new_recipe_passes_the_matrix_on_a_llama(recipe: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tests.support.newcomers",
        "-n",
        "0",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    files = [f"tests/behaviour/test_{name}.py" for name in FILES]
    done = subprocess.run(
        [*command, "-k", f"{recipe} and not ({' or '.join(OTHERS)})", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) >= 40
