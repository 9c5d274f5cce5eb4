"""Training: the arguments, the job of ``molora train``, the demo's model and data, and a Trainer for mixtures."""

from __future__ import annotations

from typing import Any

__all__ = ["Trainer", "TrainingArguments", "find_newest"]  # noqa: F822 found by __getattr__: transformers' Trainer is slow to import


def __getattr__(name: str) -> Any:
    if name == "Trainer":
        from molora.training.trainer import Trainer

        return Trainer
    if name == "TrainingArguments":
        from molora.training.settings import TrainingArguments

        return TrainingArguments
    if name == "find_newest":
        from molora.training.checkpoints import find_newest

        return find_newest
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
