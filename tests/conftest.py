"""Fixtures, the mark of tests that compare bits, and the report on tolerances."""

from __future__ import annotations

import itertools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support import tolerances
from tests.support.marks import claims_bits
from tests.support.tolerances import TOLERANCES, close

__all__ = ["TOLERANCES", "close"]

# Triton kernels run compiled, or in the interpreter, which has to be on from the start: see test_interpreted.py.
collect_ignore = (
    [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1" else ["kernels/interpreted"]
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tolerances", action="store_true", help="print how much of each bound was used")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands over what its tests used."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tolerances"] = tolerances.used


def pytest_testnodedown(node: Any) -> None:
    tolerances.add(getattr(node, "workeroutput", {}).get("tolerances", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if terminalreporter.config.getoption("--tolerances"):
        terminalreporter.section("tolerances: largest error / bound")
        for line in tolerances.report():
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what compares bit by bit; long files first, so that no process of xdist is left alone with one at the end.

    Files whose tests start several processes take turns with those of slow tests: two of the former at once would
    share the cores of a small machine among four.
    """
    kinds: dict[Path, int] = {}
    for item in items:
        if isinstance(item, pytest.Function) and claims_bits(item.function):
            item.add_marker("bits")
        kind = 2 if item.get_closest_marker("dist") else 1 if item.get_closest_marker("slow") else 0
        kinds[item.path] = max(kind, kinds.get(item.path, 0))
    several, slow, others = ([path for path, kind in kinds.items() if kind == k] for k in (2, 1, 0))
    turns = [path for pair in itertools.zip_longest(several, slow) for path in pair if path is not None]
    place = {path: i for i, path in enumerate((*turns, *others))}
    items.sort(key=lambda item: place[item.path])


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """One thread or as many as OMP_NUM_THREADS says, fixed seeds, deterministic algorithms; quiet transformers."""
    transformers.logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for adapters that several tests share."""
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="session")
def specialists(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The mixture of tests/support/planted.py with its texts by domain; for tests that leave it as it is."""
    from tests.support.planted import planted  # seconds of imports that most tests do without

    return planted(tmp_path_factory.mktemp("planted"))
