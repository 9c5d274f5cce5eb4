"""The section "scores" of an evaluation: perplexity by domain, multiple choice, exact match, with bounds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel

from molora.data.examples import Example, Record, encode, learned
from molora.errors import ConfigError
from molora.eval.document import DIGITS
from molora.eval.ledger import Ledger, Track, quiet
from molora.eval.scoring.bootstrap import ratio_bounds
from molora.eval.scoring.choices import Choice, likelihoods, picks
from molora.eval.scoring.losses import Scorer, answer_scores, row_losses

__all__ = ["SCHEMA", "document_losses", "scores"]

SCHEMA = 1
NO_CHOICES: Mapping[str, Sequence[Choice]] = MappingProxyType({})


def document_losses(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[Record],
    max_length: int,
    size: int = 8,
    track: Track = quiet,
    what: str = "loss",
) -> list[tuple[float, int]]:
    """Of each record, over all its windows of ``max_length`` tokens: the summed loss in nats, and how many tokens were
    predicted. Records without a token to predict are left out.
    """
    rows, owners = list[Example](), list[int]()
    for i, record in enumerate(records):
        own = [row for row in encode(record, tokenizer, max_length) if learned(row)]
        rows += own
        owners += [i] * len(own)
    found = row_losses(model, rows, tokenizer.pad_token_id or 0, size, track, what)
    totals: dict[int, tuple[float, int]] = {}
    for owner, (loss, tokens) in zip(owners, found, strict=True):
        before = totals.get(owner, (0.0, 0))
        totals[owner] = before[0] + loss, before[1] + tokens
    return list(totals.values())


def scores(
    model: PreTrainedModel,
    tokenizer: Any,
    *,
    domains: Mapping[str, Sequence[Record]],
    choices: Mapping[str, Sequence[Choice]] = NO_CHOICES,
    scorer: Scorer,
    max_length: int = 512,
    max_new_tokens: int = 24,
    size: int = 8,
    seed: int = 0,
    resamples: int = 500,
    ledger: Ledger | None = None,
    track: Track = quiet,
) -> dict[str, Any]:
    """All scores as plain values, numbers rounded; the same model, data and seed give the same bytes.

    ``perplexity`` by domain: exp of the loss in nats a token, over all tokens of the domain. ``multiple_choice``: see
    :func:`molora.eval.scoring.choices.picks`; ``chance`` is what guessing gets. ``exact_match``: of the domains'
    conversations, by task, or by domain where a record has no task; ``scorer`` says 1 for a right answer of at most
    ``max_new_tokens``. Bounds hold 95 % of ``resamples`` draws of documents or questions. A key is missing where there
    is nothing of its kind. What ``ledger`` has from an earlier run is not computed again.

    Raises:
        ConfigError: a domain without a token to predict, or a loss that is not a finite number.
    """
    kept = Ledger() if ledger is None else ledger
    losses: dict[str, Any] = {}
    for name, records in domains.items():
        what = f"perplexity of {name}"

        def measure(records: Sequence[Record] = records, what: str = what) -> list[tuple[float, int]]:
            return document_losses(model, tokenizer, records, max_length, size, track, what)

        losses[name] = _perplexity(name, kept.piece(what, measure), resamples, seed)
    answered: dict[str, Any] = {}
    for name, questions in choices.items():
        what = f"choices of {name}"

        def ask(questions: Sequence[Choice] = questions, what: str = what) -> list[list[float]]:
            return likelihoods(model, tokenizer, questions, size, track, what)

        answered[name] = _accuracy(questions, kept.piece(what, ask), resamples, seed)
    right: dict[str, list[float]] = {}
    for name, records in domains.items():
        asked, what = [r for r in records if r.messages], f"answers of {name}"

        def answer(asked: Sequence[Record] = asked, what: str = what) -> dict[str, list[float]]:
            return answer_scores(model, tokenizer, asked, scorer, max_new_tokens, size, track, what)

        for task, values in kept.piece(what, answer).items() if asked else ():
            right.setdefault(task or name, []).extend(values)
    exact = {name: {**_bounds(v, [1] * len(v), resamples, seed), "questions": len(v)} for name, v in right.items()}
    found = {"perplexity": losses, "multiple_choice": answered, "exact_match": exact}
    return {"schema": SCHEMA, **{k: v for k, v in found.items() if v}}


def _perplexity(name: str, documents: Sequence[Sequence[Any]], resamples: int, seed: int) -> dict[str, Any]:
    sums, tokens = [float(loss) for loss, _ in documents], [int(n) for _, n in documents]
    if not documents:
        raise ConfigError(f"{name}: no record has a token to predict, expected texts of at least two tokens")
    mean = sum(sums) / sum(tokens)
    if not math.isfinite(mean):
        raise ConfigError(f"{name}: the loss is {mean}, expected a finite number; try dtype float32")
    bounds = _bounds(sums, tokens, resamples, seed)
    return {
        "loss": bounds,
        "perplexity": round(math.exp(mean), DIGITS),
        "tokens": sum(tokens),
        "documents": len(documents),
    }


def _accuracy(
    questions: Sequence[Choice], found: Sequence[Sequence[float]], resamples: int, seed: int
) -> dict[str, Any]:
    ones, marks = [1] * len(questions), picks(questions, found)
    return {
        "accuracy": _bounds([plain for plain, _ in marks], ones, resamples, seed),
        "accuracy_normalised": _bounds([normalised for _, normalised in marks], ones, resamples, seed),
        "questions": len(questions),
        "chance": round(sum(1 / len(q.choices) for q in questions) / len(questions), DIGITS),
    }


def _bounds(sums: Sequence[float], counts: Sequence[float], resamples: int, seed: int) -> dict[str, float]:
    return {k: round(v, DIGITS) for k, v in ratio_bounds(sums, counts, resamples, seed).items()}
