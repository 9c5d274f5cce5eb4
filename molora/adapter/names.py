"""Module names: PEFT's per-module patterns without running one, and the same modules under another prefix."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from molora.errors import AdapterError

__all__ = ["PREFIX", "exact_pattern", "first_match", "renamings"]

PREFIX = "base_model.model."  # PEFT's, before every parameter name
_PLAIN = re.compile(r"\^?(?:[\w.-]|\\[^\w\s])+")
_INSIDE = r".*\."  # what PEFT itself writes before the name of experts that it found stacked


def first_match(patterns: Iterable[str], path: str, what: str) -> str | None:
    """The first of ``patterns`` that PEFT would apply to the module ``path``: ``re.match(rf"(.*\\.)?({key})$", path)``.

    A plain name fits the end of a path by whole components, from the start with ``^``, and less than the whole path
    after a leading "anything and a dot". A bare dot fits any character.

    Raises:
        AdapterError: naming ``what``, for a pattern that is not a plain name.
    """
    found = None
    for pattern in patterns:
        plain = pattern.removeprefix(_INSIDE)
        if not _PLAIN.fullmatch(plain) or (plain != pattern and plain.startswith("^")):
            raise AdapterError(
                f"{what}: got {pattern[:200]!r}, expected plain module names: a regular expression out of a file is "
                "not run; save the adapter with one entry for each module"
            )
        rest = path if plain == pattern else path.partition(".")[2]
        if found is None and _fits(plain, rest):
            found = pattern
    return found


def _fits(pattern: str, path: str) -> bool:
    anchored = pattern.startswith("^")
    letters = re.findall(r"\\.|.", pattern.removeprefix("^"))
    head, tail = path[: -len(letters)], path[-len(letters) :]
    if len(tail) < len(letters) or (head and (anchored or not head.endswith("."))):
        return False
    return all(p == "." or p[-1] == c for p, c in zip(letters, tail, strict=True))


def exact_pattern(path: str) -> str:
    """The pattern that fits the module ``path`` and no other."""
    return "^" + re.escape(path)


def renamings(names: list[str], paths: Collection[str]) -> list[dict[str, str]]:
    """The ways to find all of ``names`` among ``paths``: as they are; else with one prefix added to or cut from each.

    Prefixes end at a dot. Several ways come back when several fit, and none when no prefix fits every name.
    """
    if all(n in paths for n in names):
        return [{n: n for n in names}]
    first = names[0]
    changes = {("", p.removesuffix(first)) for p in paths if p.endswith("." + first)}
    changes |= {(first.removesuffix(p), "") for p in paths if p and first.endswith("." + p)}
    ways = [{n: add + n[len(cut) :] for n in names if n.startswith(cut)} for cut, add in sorted(changes)]
    return [w for w in ways if len(w) == len(names) and all(p in paths for p in w.values())]
