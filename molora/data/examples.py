"""Records of a domain: split without leaks, tokenised with the prompt masked, batched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor

from molora.data.records import Record
from molora.errors import ConfigError

__all__ = [
    "IGNORED",
    "Collator",
    "Example",
    "Record",
    "answer_ids",
    "apart",
    "deduplicated",
    "drawn",
    "encode",
    "encode_class",
    "learned",
    "split",
    "turns",
]

IGNORED = -100  # a label that torch's cross-entropy leaves out
SHORTEST_WINDOW = 16  # tokens; a shorter rest of a long text is dropped


class Example(TypedDict):
    """One training row: token ids and labels of the same length, ``IGNORED`` where no loss is wanted.

    A classifier's row has a ``label`` instead, and empty ``labels``. ``task_ids``: the expert that a supervised router
    should choose, for the row, or for each token of a packed row, whose ``position_ids`` start again with each text.
    ``record``: where an image comes from, which is read when the row is used.
    """

    input_ids: list[int]
    labels: list[int]
    label: NotRequired[int]
    domain: NotRequired[str]
    task_ids: NotRequired[int | list[int]]
    position_ids: NotRequired[list[int]]
    record: NotRequired[Record]


def learned(row: Example) -> int:
    """How many labels a row has: the tokens that are predicted, or the one class."""
    return 1 if "label" in row else sum(label != IGNORED for label in row["labels"][1:])


def _plain(record: Record, prompt_only: bool = False) -> str:
    """Content with case and spacing taken out, so that near-copies count as copies."""
    turns = record.prompt if prompt_only else record.messages
    parts = [record.text] if not record.messages else [f"{m['role']}: {m['content']}" for m in turns]
    return "\n".join(" ".join(p.casefold().split()) for p in parts)


def _group(record: Record) -> str:
    return record.group or _plain(record, prompt_only=bool(record.messages))


def deduplicated(records: Iterable[Record]) -> list[Record]:
    """The first of each set of records that differ at most in case and spacing, in the given order."""
    return list({(_plain(r), r.label, r.image): r for r in reversed(list(records))}.values())[::-1]


def split(records: Sequence[Record], heldout: float | int, seed: int) -> tuple[list[Record], list[Record]]:
    """Split into (train, held-out), duplicates dropped, no group on both sides. Without a group of its own, a
    conversation's prompt is its group, and a text its own.

    ``heldout``: a share below 1 or a number of records. Which group is held out depends on its name and ``seed``
    only, not on the order or the number of records.

    Raises:
        ConfigError: when one side would be empty.
    """
    records = deduplicated(records)
    wanted = max(1, round(heldout * len(records)) if heldout < 1 else int(heldout))
    groups: dict[str, list[Record]] = {}
    for r in records:
        groups.setdefault(_group(r), []).append(r)
    order = sorted(groups, key=lambda g: hashlib.blake2b(f"{seed}\0{g}".encode()).digest())
    held: list[Record] = []
    while order and len(held) < wanted:
        held += groups[order.pop(0)]
    train = [r for g in order for r in groups[g]]
    if not train:
        raise ConfigError(
            f"got {len(records)} distinct records in {len(groups)} groups, expected more than the {wanted} to hold "
            "out; add records or lower heldout"
        )
    return train, held


def drawn(records: Sequence[Record], most: int, seed: int) -> list[Record]:
    """At most ``most`` records (0: all) in their order; which ones depends on their texts and the seed only."""

    def rank(i: int) -> bytes:
        return hashlib.blake2b(f"{seed}\0{_plain(records[i])}".encode()).digest()

    return [records[i] for i in sorted(sorted(range(len(records)), key=rank)[: most or len(records)])]


def apart(train: Sequence[Record], heldout: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """(train, held-out) of two files, duplicates dropped, without the training records whose group is held out.

    Raises:
        ConfigError: when nothing is left to train on.
    """
    held = deduplicated(heldout)
    taken = {_group(r) for r in held}
    left = [r for r in deduplicated(train) if _group(r) not in taken]
    if not left:
        raise ConfigError(f"got {len(train)} training records that are all held out as well, expected others")
    return left, held


def encode(record: Record, tokenizer: Any, max_length: int) -> list[Example]:
    """Tokenise: a text becomes windows of ``max_length`` tokens; a conversation one row, cut at ``max_length``.

    A text's every token is a label. Of a conversation only the assistant's turns are, up to the end token; the prompt
    is tokenised by itself, as it is when the model answers. A row whose labels are all cut off is left out.
    """
    if record.messages:
        ids, labels = _conversation(record.messages, tokenizer)
        rows = [Example(input_ids=ids[:max_length], labels=labels[:max_length])]
    else:
        ids = list(tokenizer(record.text, verbose=False).input_ids)
        ids += (
            [] if tokenizer.eos_token_id is None or ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        )
        starts = [i for i in range(0, len(ids), max_length) if i == 0 or len(ids) - i >= SHORTEST_WINDOW]
        rows = [Example(input_ids=ids[i : i + max_length], labels=ids[i : i + max_length]) for i in starts]
    return [row for row in rows if learned(row)]


def encode_class(record: Record, tokenizer: Any, max_length: int, label: int) -> Example:
    """One row of a classifier: the text, cut at ``max_length`` tokens, and its class."""
    ids = tokenizer(record.text, truncation=True, max_length=max_length, verbose=False).input_ids
    return Example(input_ids=list(ids), labels=[], label=label)


def turns(messages: Sequence[Mapping[str, Any]], template: Any) -> Iterator[tuple[str, str]]:
    """The conversation as text, in pairs: what stands before an answer of the assistant, and the answer.

    ``template``: a tokenizer or processor with a chat template.

    Raises:
        ConfigError: no template, or one that rewrites what it wrote.
    """
    if not getattr(template, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, so 'messages' cannot be written as text; use an instruction-tuned "
            "model, or 'text' records"
        )
    said = [dict(m) for m in messages]
    written = ""
    for i in (i for i, m in enumerate(said) if m["role"] == "assistant"):
        prompt = template.apply_chat_template(said[:i], tokenize=False, add_generation_prompt=True)
        whole = template.apply_chat_template(said[: i + 1], tokenize=False)
        if not (prompt.startswith(written) and whole.startswith(prompt)):
            raise ConfigError(
                "the chat template rewrites earlier turns when a later one is added, so the answers cannot be told "
                f"from the prompt; got {whole!r} after {prompt!r}; use conversations of one question and one answer"
            )
        yield prompt[len(written) :], whole[len(prompt) :]
        written = whole


def _conversation(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    labels: list[int] = []
    for before, answer in turns(messages, tokenizer):
        asked = tokenizer(before, add_special_tokens=False).input_ids
        said, wanted = answer_ids(answer, tokenizer)
        ids += asked + said
        labels += [IGNORED] * len(asked) + wanted
    return ids, labels


def answer_ids(answer: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids of an answer, and its labels: up to the end token."""
    said = list(tokenizer(answer, add_special_tokens=False).input_ids)
    end = said.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in said else len(said)
    return said, said[:end] + [IGNORED] * (len(said) - end)


@dataclass(frozen=True)
class Collator:
    """Rows to a batch of ``input_ids``, ``attention_mask`` and ``labels``, each (B, S) int64, padded on the right.

    The mask comes from the rows' lengths, so a padding token that is also the end token is handled. ``labels`` and
    ``task_ids`` that belong to a whole row are (B,). Tensors of images are laid one after the other. Packed rows
    become one row, (1, S) with ``position_ids``: without padding, and without a mask, since transformers takes the
    borders from the positions only then.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Pad to the longest row."""
        if "position_ids" in rows[0]:
            keys = [k for k in ("input_ids", "labels", "position_ids", "task_ids") if k in rows[0]]
            return {k: torch.tensor([[value for row in rows for value in row[k]]]) for k in keys}
        lengths = [len(row["input_ids"]) for row in rows]

        def padded(values: Iterable[list[int]], fill: int) -> Tensor:
            return torch.tensor([v + [fill] * (max(lengths) - len(v)) for v in values])

        labels = torch.tensor([row["label"] for row in rows]) if "label" in rows[0] else None
        out = {
            "input_ids": padded((row["input_ids"] for row in rows), self.pad_token_id),
            "attention_mask": padded(([1] * n for n in lengths), 0),
            "labels": padded((row["labels"] for row in rows), IGNORED) if labels is None else labels,
        }
        if "task_ids" in rows[0]:
            out["task_ids"] = torch.tensor([row["task_ids"] for row in rows])
        for key in dict.fromkeys(k for row in rows for k in row if k not in Example.__annotations__):
            values = [row.get(key) for row in rows]
            if any(isinstance(v, list) for v in values):
                out[key] = padded((v or [] for v in values), 0)
            else:
                out[key] = _stacked(key, [v for v in values if isinstance(v, Tensor)])
        return out


def _stacked(key: str, values: list[Tensor]) -> Tensor:
    try:
        return torch.cat(values)
    except RuntimeError as e:
        shapes = ", ".join(sorted({str(tuple(v.shape)) for v in values}))
        raise ConfigError(
            f"images of one batch become {key!r} of shapes {shapes}, which cannot be one tensor; use "
            "per_device_train_batch_size 1, or images of one size"
        ) from e
