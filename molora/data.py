"""Domain files: one JSONL file a domain; read, split without leaks, tokenised with the prompt masked, batched.

A line is ``{"text": "..."}`` or ``{"messages": [{"role": "user", "content": "..."}, ..., {"role": "assistant", ..}]}``.
An optional ``"group"`` names what must stay on one side of the split (a document, a problem). Other keys are ignored.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from molora.errors import ConfigError

__all__ = ["IGNORED", "Collator", "Example", "Record", "apart", "deduplicated", "encode", "read_jsonl", "split"]

IGNORED = -100  # a label that torch's cross-entropy leaves out
SHORTEST_WINDOW = 16  # tokens; a shorter rest of a long text is dropped
ROLES = ("system", "user", "assistant", "tool")
BAD_LINES_SHOWN = 5


class Example(TypedDict):
    """One training row: token ids and labels of the same length, ``IGNORED`` where no loss is wanted."""

    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Record:
    """One line of a domain file: plain text, or a conversation that ends with the assistant.

    ``group``: what must not be split apart. ``task``: which scorer judges an answer, empty for equality;
    ``entry``: what that scorer needs.
    """

    text: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    group: str = ""
    task: str = ""
    entry: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def prompt(self) -> tuple[Mapping[str, str], ...]:
        """The conversation up to the last answer."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The last answer of a conversation, empty for plain text."""
        return self.messages[-1]["content"] if self.messages else ""


def read_jsonl(path: Path | str) -> list[Record]:
    """Read one domain file.

    Raises:
        ConfigError: file missing, unreadable or empty; or, for the first bad lines, file, line number and fault.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ConfigError(f"{path} {what}; expected a JSONL file with a 'text' or 'messages' entry on every line")
    records, faults = [], []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            try:
                records.append(_record(json.loads(line)))
            except ValueError as e:
                faults.append(f"{path}:{number}: {_fault(e)}")
    if faults:
        more = f"\n... and {len(faults) - BAD_LINES_SHOWN} more lines" if len(faults) > BAD_LINES_SHOWN else ""
        raise ConfigError("\n".join(faults[:BAD_LINES_SHOWN]) + more)
    if not records:
        raise ConfigError(f"{path} has no records; expected one JSON object a line")
    return records


def _fault(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at column {error.colno}"
    return str(error)


def _record(line: Any) -> Record:
    if not isinstance(line, dict):
        raise ValueError(f"got a JSON {type(line).__name__}, expected an object with 'text' or 'messages'")
    if ("text" in line) == ("messages" in line):
        found = ", ".join(map(repr, list(line)[:8])) or "no entries"
        raise ValueError(f"got {found}, expected exactly one of 'text' and 'messages'")
    group = line.get("group", "")
    if not isinstance(group, str | int):
        raise ValueError(f"'group': got {type(group).__name__}, expected a string")
    if "messages" in line:
        return Record(messages=_messages(line["messages"]), group=str(group))
    if not isinstance(line["text"], str) or not line["text"].strip():
        raise ValueError(f"'text': got {line['text']!r}, expected a non-empty string")
    return Record(text=line["text"], group=str(group))


def _messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"'messages': got {value!r}, expected a non-empty list")
    for i, m in enumerate(value):
        if not isinstance(m, dict) or m.get("role") not in ROLES or not isinstance(m.get("content"), str):
            raise ValueError(f"'messages'[{i}]: got {m!r}, expected 'role' ({', '.join(ROLES)}) and 'content' as text")
    if value[-1]["role"] != "assistant" or not value[-1]["content"].strip():
        raise ValueError("'messages': the last one must be a non-empty answer of the assistant, it is what is learned")
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _plain(record: Record, prompt_only: bool = False) -> str:
    """Content with case and spacing taken out, so that near-copies count as copies."""
    turns = record.prompt if prompt_only else record.messages
    parts = [record.text] if not record.messages else [f"{m['role']}: {m['content']}" for m in turns]
    return "\n".join(" ".join(p.casefold().split()) for p in parts)


def _group(record: Record) -> str:
    return record.group or _plain(record, prompt_only=bool(record.messages))


def deduplicated(records: Iterable[Record]) -> list[Record]:
    """The first of each set of records that differ at most in case and spacing, in the given order."""
    return list({_plain(r): r for r in reversed(list(records))}.values())[::-1]


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
    return [row for row in rows if any(label != IGNORED for label in row["labels"][1:])]


def _conversation(messages: Sequence[Mapping[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "the tokenizer has no chat template, so 'messages' cannot be written as text; use an instruction-tuned "
            "model, or 'text' records"
        )
    turns = [dict(m) for m in messages]
    ids: list[int] = []
    labels: list[int] = []
    written = ""
    for i in (i for i, m in enumerate(turns) if m["role"] == "assistant"):
        prompt = tokenizer.apply_chat_template(turns[:i], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(turns[: i + 1], tokenize=False)
        if not (prompt.startswith(written) and whole.startswith(prompt)):
            raise ConfigError(
                "the chat template rewrites earlier turns when a later one is added, so the answers cannot be told "
                f"from the prompt; got {whole!r} after {prompt!r}; use conversations of one question and one answer"
            )
        asked = tokenizer(prompt[len(written) :], add_special_tokens=False).input_ids
        said = tokenizer(whole[len(prompt) :], add_special_tokens=False).input_ids
        end = said.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in said else len(said)
        ids += asked + said
        labels += [IGNORED] * len(asked) + said[:end] + [IGNORED] * (len(said) - end)
        written = whole
    return ids, labels


@dataclass(frozen=True)
class Collator:
    """Rows to a padded batch: ``input_ids``, ``attention_mask`` and ``labels``, each (B, S) int64, padded on the right.

    The mask comes from the rows' lengths, so a padding token that is also the end token is handled.
    """

    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Example]) -> dict[str, Tensor]:
        """Pad to the longest row."""
        length = max(len(row["input_ids"]) for row in rows)

        def padded(values: Iterable[list[int]], fill: int) -> Tensor:
            return torch.tensor([v + [fill] * (length - len(v)) for v in values])

        return {
            "input_ids": padded((row["input_ids"] for row in rows), self.pad_token_id),
            "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
            "labels": padded((row["labels"] for row in rows), IGNORED),
        }
