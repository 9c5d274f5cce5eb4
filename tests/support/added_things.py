"""Files that add a thing to molora from outside, imported as a user's own files are; and taken out again."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from molora.data.formats import FORMATS
from molora.initialisers import INITIALISERS
from molora.interop.importers import IMPORTERS
from molora.layers.banks import BANKS
from molora.penalties import PENALTIES
from molora.recipes import RECIPES
from molora.routers import BALANCES, GATES, ROUTERS
from tests.support.places import ROOT

TABLES: tuple[dict[str, Any], ...] = (
    BALANCES, BANKS, FORMATS, GATES, IMPORTERS, INITIALISERS, PENALTIES, RECIPES, ROUTERS,
)  # fmt: skip
FILES = sorted(path for path in (ROOT / "tests" / "support" / "added").glob("[a-z]*.py"))


def load(path: Path) -> None:
    """Run a file as a module, as ``import`` does."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where typing looks names up
    spec.loader.exec_module(module)


@contextmanager
def added(folder: Path, *names: str) -> Iterator[None]:
    """Within the block, the things of these files are in their tables, from copies in ``folder``; all without names."""
    before = [dict(table) for table in TABLES]
    modules = set(sys.modules)
    try:
        for path in FILES:
            if not names or path.stem in names:
                load(Path(shutil.copy(path, folder)))
        yield
    finally:
        for table, entries in zip(TABLES, before, strict=True):
            table.clear()
            table.update(entries)
        for name in set(sys.modules) - modules:
            if name in {path.stem for path in FILES}:
                del sys.modules[name]
