"""The error tree. Every message says what is wrong, what was found, what was expected, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AdapterError", "CheckpointError", "ConfigError", "MoloraError", "TargetError", "nearest"]


class MoloraError(ValueError):
    """Base of every error that molora raises on purpose; also a ``ValueError``."""


class ConfigError(MoloraError):
    """An option, a combination of options or a call that cannot work; raised before anything is changed."""


class TargetError(MoloraError):
    """A module that was asked for does not exist, or cannot be adapted."""


class AdapterError(MoloraError):
    """An adapter folder that is not whole, not trusted, or made for another base model."""


class CheckpointError(MoloraError):
    """A folder that cannot be written or read as a checkpoint."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for the names closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
