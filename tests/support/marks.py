"""The mark ``bits``: tests that compare computed numbers bit by bit, here or in a helper.

They are run under several settings of the libraries that multiply (CONTRIBUTING.md), since each may take other paths.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

EXACT = {"equal", "array_equal"}  # torch.equal, numpy.array_equal


def claims_bits(test: Any) -> bool:
    """Whether the function, or a function of ``tests`` that it calls by name, compares bit by bit.

    Calls through a table and in other processes are not followed; such tests bear the mark in their file.
    """
    seen: set[FunctionType] = set()
    open_ends = [test]
    while open_ends:
        function = open_ends.pop()
        function = getattr(function, "__wrapped__", function)  # under functools.cache
        if not isinstance(function, FunctionType) or function in seen or not _ours(function):
            continue
        seen.add(function)
        names = set(_names(function.__code__))
        if names & EXACT:
            return True
        known = [function.__globals__[n] for n in names if n in function.__globals__]
        modules = [m for m in known if isinstance(m, ModuleType) and m.__name__.startswith("tests.")]
        open_ends += known + [vars(m)[n] for m in modules for n in names if n in vars(m)]
    return False


def _ours(function: FunctionType) -> bool:
    return function.__module__.startswith(("tests.", "test_"))


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
