"""The part of an adapter's README.md that belongs to one set of weights: between two comments, the first naming them.

What was measured on some weights says nothing about others, so a save keeps the section of the same weights only.
"""

from __future__ import annotations

import re

from molora.errors import AdapterError

__all__ = ["after_save", "put", "without"]

OPENING = "<!-- molora: routing of the weights "
END = "<!-- molora: end of routing -->"
_SECTION = re.compile(rf"\n?{OPENING}sha256 ([0-9a-f]{{64}}) -->\n.*?\n{END}\n", re.DOTALL)


def put(card: str, sha256: str, text: str) -> str:
    """``card`` with ``text``, measured on the weights of this digest, as its section: in place of one, or at the end.

    Raises:
        AdapterError: when the comments in ``card`` do not fit together.
    """
    found = _SECTION.findall(card)
    if {len(found), card.count(OPENING), card.count(END)} not in ({0}, {1}):
        raise AdapterError(
            f"the model card has {card.count(OPENING)} lines that begin with {OPENING!r} and {card.count(END)} lines "
            f"{END!r}, expected one section at most; take these lines out of it"
        )
    section = f"\n{OPENING}sha256 {sha256} -->\n{text.strip()}\n{END}\n"
    return _SECTION.sub(lambda _: section, card) if found else f"{card.rstrip()}\n{section}"


def without(card: str) -> str:
    """``card`` without its section."""
    return _SECTION.sub("", card)


def after_save(old: str | None, card: str, sha256: str) -> str:
    """The README after a save of weights with this digest: ``card``, with the section of the same weights.

    Somebody's own README, which does not speak of molora, stays, but for a section of other weights.
    """
    if old is None:
        return card
    found = _SECTION.search(old)
    same = found is not None and found[1] == sha256
    if "molora" not in without(old):
        return old if same else without(old)
    return f"{card.rstrip()}\n{found[0]}" if found is not None and same else card
