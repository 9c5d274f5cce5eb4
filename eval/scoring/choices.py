"""Multiple choice: questions from a file, each choice scored by its likelihood after the question.

A line is ``{"question": "...", "choices": ["...", ...], "answer": 1}``; a choice follows the question after a blank. A
line with ``context`` instead of ``question`` brings its own blank, or none: the choice follows it as it is. ``answer``
is an index from 0, the text of a choice, or a letter (A is the first) where no choice has that text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from molora.data.examples import IGNORED, Example
from molora.data.sources import read_lines
from molora.errors import ConfigError
from molora.eval.ledger import Track, quiet
from molora.eval.scoring.losses import row_losses

__all__ = ["Choice", "choice_rows", "likelihoods", "picks", "read_choices"]

KEYS = ("question", "context")
Row = tuple[list[int], list[int]]


@dataclass(frozen=True)
class Choice:
    """A question with its choices. ``prompt`` stands before a choice, the blank between included."""

    prompt: str
    choices: tuple[str, ...]
    answer: int
    where: str = field(default="", compare=False)


def read_choices(path: Path | str) -> list[Choice]:
    """Read a file of JSON lines, gzipped if its name ends with ``.gz``.

    Raises:
        ConfigError: file missing, unreadable or empty; or, for the first bad lines, file, line number and fault.
    """
    return read_lines(path, _choice)


def _choice(line: Any, where: str) -> Choice:
    if not isinstance(line, dict):
        raise ValueError(f"got a JSON {type(line).__name__}, expected an object with 'question', 'choices', 'answer'")
    given = [k for k in KEYS if k in line]
    missing = [k for k in ("choices", "answer") if k not in line]
    if len(given) != 1 or missing:
        found = ", ".join(map(repr, list(line)[:8])) or "no entries"
        raise ValueError(f"got {found}, expected one of 'question' and 'context', 'choices' and 'answer'")
    text, choices = line[given[0]], line["choices"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{given[0]!r}: got {text!r}, expected a non-empty string")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise ValueError(f"'choices': got {choices!r}, expected a list of at least two non-empty strings")
    prompt = text if given[0] == "context" else f"{text} "
    return Choice(prompt, tuple(choices), _answer(line["answer"], choices), where)


def _answer(value: Any, choices: list[str]) -> int:
    if isinstance(value, str) and value in choices:
        return choices.index(value)
    index = value
    if isinstance(value, str):
        index = ord(value) - ord("A") if len(value) == 1 else -1
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(choices):
        last = chr(ord("A") + len(choices) - 1)
        raise ValueError(
            f"'answer': got {value!r}, expected an index from 0 to {len(choices) - 1}, the text of a choice, or a "
            f"letter from A to {last}"
        )
    return index


def _encoded(prompt: str, choice: str, tokenizer: Any) -> Row:
    """Tokens of the prompt and of the choice, as lm-evaluation-harness parts them (``TemplateLM._encode_pair``): blanks
    at the prompt's end go to the choice, the whole is tokenised at once and cut at the prompt's own number of tokens.
    """
    start = tokenizer.bos_token or tokenizer.eos_token or ""
    special = {"add_special_tokens": False} if start and prompt.startswith(start) else {}
    whole = list(tokenizer(prompt + choice, verbose=False, **special).input_ids)
    asked = list(tokenizer(prompt.rstrip(), verbose=False, **special).input_ids)
    return whole[: len(asked)], whole[len(asked) :]


def choice_rows(questions: Sequence[Choice], tokenizer: Any, longest: int | None = None) -> list[Example]:
    """A row for each choice of each question in turn; labels are the choice's tokens.

    ``longest``: tokens that the model has positions for; what is longer loses its beginning.

    Raises:
        ConfigError: a choice that adds no token to its question, or has more than ``longest``.
    """
    rows = []
    for q in questions:
        for text in q.choices:
            asked, said = _encoded(q.prompt, text, tokenizer)
            room = len(said) if longest is None else longest - 1
            if not asked or not 0 < len(said) <= room:
                raise ConfigError(
                    f"{q.where or q.prompt!r}: the choice {text!r} has {len(said)} tokens after the question's "
                    f"{len(asked)}, expected at least one of each" + (f", and at most {room}" if longest else "")
                )
            start = 0 if longest is None else -longest
            rows.append(
                Example(input_ids=(asked + said)[start:], labels=([IGNORED] * len(asked) + said)[start:]),
            )
    return rows


def likelihoods(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Choice],
    size: int = 8,
    track: Track = quiet,
    what: str = "choices",
) -> list[list[float]]:
    """Summed log-likelihood of each choice's tokens after its question, in nats, by question; in float32.

    lm-evaluation-harness's ``multiple_choice`` with ``doc_to_text: question`` and its default ``target_delimiter``, a
    blank; without a conversation template, whatever the tokenizer has.
    """
    config: Any = model.config
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    rows = choice_rows(questions, tokenizer, longest)
    found = iter(row_losses(model, rows, tokenizer.pad_token_id or 0, size, track, what))
    return [[-loss for _, (loss, _) in zip(q.choices, found, strict=False)] for q in questions]


def picks(questions: Iterable[Choice], found: Iterable[Sequence[float]]) -> list[tuple[bool, bool]]:
    """Whether the likeliest choice is right, and the likeliest by character of its text (lm-eval's ``acc`` and
    ``acc_norm``); of equals the first counts.
    """
    out = []
    for q, values in zip(questions, found, strict=True):
        by_length = [v / len(c) for v, c in zip(values, q.choices, strict=True)]
        plain, normalised = (max(range(len(v)), key=v.__getitem__) for v in (values, by_length))
        out.append((plain == q.answer, normalised == q.answer))
    return out
