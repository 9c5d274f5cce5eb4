"""Random numbers that depend on a seed and on names alone."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["generator"]


def generator(seed: int, *names: str) -> torch.Generator:
    """A CPU generator that depends on the seed and the names alone, not on order or the global random state."""
    digest = hashlib.sha256("\0".join((str(seed), *names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
