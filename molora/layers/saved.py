"""A module of the base that is trained whole, beside its frozen original."""

from __future__ import annotations

from typing import Any

from torch import nn

from molora import context
from molora.layers.mixture import Owner
from molora.layers.wrapper import Wrapper

__all__ = ["SavedModule"]


class SavedModule(Wrapper):
    """A module trained and saved whole (``modules_to_save``): a trainable copy beside the frozen original."""

    inner, saved = "original", ("trained",)

    def __init__(self, original: nn.Module, trained: nn.Module, owner: Owner, path: str) -> None:
        super().__init__()
        self.original, self.trained, self.owner, self.path = original, trained, owner, path

    @property
    def place(self) -> str:
        """The path of the original in the base."""
        return self.path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output; the original's while the adapter is off."""
        return (self.original if context.is_off(self.owner) else self.trained)(*args, **kwargs)
