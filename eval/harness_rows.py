"""Whose rows a batch of lm-evaluation-harness holds, where each of them ends, and the file of what was counted."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["NOBODY", "Document", "ExpectedRows", "answered_rows", "document_of", "fed_tokens", "padded"]


class Document(NamedTuple):
    """The task, and which of its documents: all choices of a question, and all windows of a text, are one."""

    task: str
    number: str

    @property
    def key(self) -> str:
        """Of all documents of all tasks."""
        return f"{self.task}/{self.number}"


NOBODY = Document("", "")  # of rows that lm-eval adds itself


def document_of(request: Any) -> Document:
    """Of one of lm-eval's requests (``Instance``)."""
    return Document(str(request.task_name), str(request.doc_id))


class ExpectedRows:
    """Rows that lm-eval will run, longest first, joined into batches with zeros at the end and without a mask.

    0 may be a token, too. So a row ends where it is one that is still to come, and of several the longest, which
    lm-eval runs before the shorter ones.
    """

    def __init__(self, rows: Iterable[tuple[tuple[int, ...], Document]]) -> None:
        rows = list(rows)
        self._left = Counter(row for row, _ in rows)
        self._of = {row: document for row, document in reversed(rows)}

    def take(self, ids_BS: Tensor) -> tuple[Tensor, list[Document]]:
        """The mask of a batch (B, S), 1 for real tokens, and the rows' documents; a row of several has the first."""
        mask_BS, documents = torch.zeros_like(ids_BS), []
        for b, ids in enumerate(ids_BS.tolist()):
            shortest = max((i + 1 for i, token in enumerate(ids) if token), default=1)
            row = next(t for n in range(len(ids), shortest - 1, -1) if self._left[t := tuple(ids[:n])])
            self._left[row] -= 1
            mask_BS[b, : len(row)] = 1
            documents.append(self._of[row])
        return mask_BS, documents


def fed_tokens(said: Sequence[int], ends: Collection[int], stops: Iterable[str], decode: Callable[..., str]) -> int:
    """How many of the tokens generated for a row it would be fed if it ran alone: all before the one that ends it.

    It ends with one of ``ends``, where the text first holds one of ``stops``, or with the last.
    """
    whole = next((i + 1 for i, token in enumerate(said) if token in ends), len(said))
    wanted = [s for s in stops if s]

    def over(n: int) -> bool:
        text = decode(said[:n])
        return any(s in text for s in wanted)

    return bisect.bisect_left(range(1, whole), True, key=over)


def answered_rows(
    prompts_BS: Tensor,
    mask_BS: Tensor,
    out_BS: Tensor,
    ends: Collection[int],
    stops: Sequence[str],
    decode: Callable[..., str],
) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, S) of what each prompt and its answer would be fed alone; both stand in ``out_BS``."""
    rows = []
    for prompt, mask, out in zip(prompts_BS, mask_BS, out_BS, strict=True):
        said = out[len(prompt) :].tolist()
        rows.append(prompt[mask != 0].tolist() + said[: fed_tokens(said, ends, stops, decode)])
    return padded(rows, prompts_BS.device)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask (B, S), zeros at the end."""
    longest = max(map(len, rows))
    ids = [[*row, *[0] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
