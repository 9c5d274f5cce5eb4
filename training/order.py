"""The order of training rows, the same after a resume as without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

__all__ = ["GroupedByLength", "grouped_by_length"]


class GroupedByLength(LengthGroupedSampler):
    """transformers' rows of like length together, drawn from a seed and the epoch.

    Theirs draws from the global random state, which a run that resumes within a later epoch does not have then.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int) -> None:
        super().__init__(batch_size, lengths=list(lengths))
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        g = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from get_length_grouped_indices(self.lengths, self.batch_size, generator=g)
        self.epoch += 1


def grouped_by_length(settings: TrainingArguments, rows: Sequence[Any]) -> GroupedByLength | None:
    """What a Trainer's ``_get_train_sampler`` should return where the settings ask for rows of like length; else None,
    since transformers' other orders can be resumed as they are.
    """
    if settings.train_sampling_strategy != "group_by_length":
        return None
    plain = getattr(rows, "rows", rows)  # without a look at images
    seed = settings.seed if settings.data_seed is None else settings.data_seed
    size = settings.train_batch_size * settings.gradient_accumulation_steps
    return GroupedByLength(size, [len(row["input_ids"]) for row in plain], seed)
