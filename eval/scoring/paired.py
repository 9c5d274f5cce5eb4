"""Losses by document: batches that mix domains, each row's own sum, and intervals over resampled documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molora.data.examples import IGNORED, Collator, Example, learned
from molora.errors import ConfigError
from molora.eval.counting.inputs import digest_of
from molora.eval.document import DIGITS
from molora.eval.scoring.bootstrap import LEVEL
from molora.eval.scoring.losses import is_seq2seq

__all__ = ["Mixed", "Resampled", "bounds", "mixed", "with_labels"]


class Mixed(NamedTuple):
    """A batch of all domains: padded tensors, the documents' numbers (B), and their domains' (B)."""

    inputs: dict[str, Tensor]
    documents: list[int]
    group_B: Tensor


def mixed(rows: Mapping[str, Sequence[Example]], pad_token_id: int, size: int) -> list[Mixed]:
    """Batches of about ``size`` rows with documents of every domain in each, as long as a domain has as many documents
    as there are batches. Of each domain the shortest come first, so that rows of like length meet.

    Documents are numbered domain after domain in the given order.
    """
    total = sum(map(len, rows.values()))
    count = max(1, -(-total // max(size, len(rows))))
    chunks: list[list[tuple[int, int, Example]]] = [[] for _ in range(count)]
    first = 0
    for g, own in enumerate(rows.values()):
        order = sorted(range(len(own)), key=lambda i: len(own[i]["input_ids"]))
        for b, chunk in enumerate(chunks):
            mine = order[b * len(own) // count : (b + 1) * len(own) // count]
            chunk += [(first + i, g, own[i]) for i in mine]
        first += len(own)
    collate = Collator(pad_token_id)
    return [
        Mixed(collate([r for _, _, r in chunk]), [n for n, _, _ in chunk], torch.tensor([g for _, g, _ in chunk]))
        for chunk in chunks
        if chunk
    ]


def with_labels(model: PreTrainedModel, rows: Mapping[str, Sequence[Example]]) -> dict[str, list[Example]]:
    """The rows that have something to predict.

    Raises:
        ConfigError: for no domain, a domain without such a row, or packed rows, whose documents have no loss of theirs.
    """
    if any("position_ids" in row for own in rows.values() for row in own):
        raise ConfigError("rows: got packed rows, expected one document a row; encode the data without packing")
    seq2seq = is_seq2seq(model)

    def wanted(row: Example) -> int:
        return sum(label != IGNORED for label in row["labels"]) if seq2seq and "label" not in row else learned(row)

    kept = {name: [row for row in own if wanted(row)] for name, own in rows.items()}
    empty = [name for name, own in kept.items() if not own]
    if empty or not kept:
        which = f"domain {', '.join(empty)}" if empty else "any domain"
        raise ConfigError(f"rows: got no document with a label in {which}, expected at least one in each domain")
    return kept


class Resampled:
    """Losses per token by domain with 95 % bounds, over documents resampled within their domain; the same documents
    every time, so that differences are paired.
    """

    def __init__(self, sizes: Mapping[str, int], resamples: int, seed: int) -> None:
        self.drawn: dict[str, Tensor] = {}
        self._sizes = sizes
        for name, n in sizes.items():
            generator = torch.Generator().manual_seed(digest_of(f"{seed}/{name}") >> 1)
            drawn_WN = torch.randint(n, (resamples, n), generator=generator)
            self.drawn[name] = torch.cat((torch.arange(n).unsqueeze(0), drawn_WN))

    def means(self, losses_N2: Tensor) -> dict[str, Tensor]:
        """Sum of losses over sum of labels, by domain: of all documents, then of each resample, (1 + W)."""
        parts = losses_N2.split(list(self._sizes.values()))
        sums = {name: own[self.drawn[name]].sum(1) for name, own in zip(self._sizes, parts, strict=True)}
        return {name: s[:, 0] / s[:, 1] for name, s in sums.items()}


def bounds(values_W: Tensor) -> dict[str, float]:
    """The first value with the 95 % percentiles of the others."""
    low, high = torch.quantile(values_W[1:], torch.tensor(LEVEL, dtype=values_W.dtype)).tolist()
    named = {"value": values_W[0].item(), "low": low, "high": high}
    return {k: round(v, DIGITS) + 0.0 for k, v in named.items()}  # + 0.0: no minus before a zero
