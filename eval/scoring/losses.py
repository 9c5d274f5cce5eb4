"""Held-out loss and greedy answers of a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from molora.data.examples import Collator, Example, Record
from molora.eval.ledger import Track, quiet

__all__ = [
    "answer",
    "answer_scores",
    "batch_losses",
    "batches",
    "exact_match",
    "generate",
    "heldout_loss",
    "is_seq2seq",
    "prompt_text",
    "row_losses",
]

Scorer = Callable[[Record, str], float]


def batches(rows: Sequence[Example], pad_token_id: int, size: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Padded batches of rows of like length, the longest first, each with the positions of its rows in ``rows``.

    So memory is at its peak at once, and the rest of a long text comes after its windows.
    """
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))
    chunks = [order[i : i + size] for i in range(0, len(order), size)]
    return [(chunk, Collator(pad_token_id)([rows[i] for i in chunk])) for chunk in chunks]


@torch.no_grad()
def batch_losses(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Each row's negative log-likelihood, summed over its labels, in nats, and the number of these: (B) float64 each.

    Labels are the next tokens; an encoder-decoder's own tokens; a classifier's classes. Softmax in float32.
    """
    labels = inputs["labels"].to(model.device)
    call = {k: v.to(model.device) for k, v in inputs.items() if k not in ("labels", "task_ids")}
    if labels.ndim == 2 and is_seq2seq(model):
        to_come = (labels >= 0).flip(1).cumsum(1).flip(1) > 0  # not the padding behind the last label
        call |= {"labels": labels, "decoder_attention_mask": to_come.long()}
    logits: Tensor = model(**call).logits
    if labels.ndim == 1:
        labels, logits = labels.unsqueeze(1), logits.unsqueeze(1)
    elif not is_seq2seq(model):
        labels, logits = labels[:, 1:], logits[:, :-1]
    wanted = labels >= 0
    loss_N = nn.functional.cross_entropy(logits[wanted].float(), labels[wanted], reduction="none").double().cpu()
    row_N = wanted.nonzero()[:, 0].cpu()
    sums_B = torch.zeros(len(labels), dtype=torch.float64).index_add(0, row_N, loss_N)
    return sums_B, wanted.sum(1).double().cpu()


def is_seq2seq(model: Any) -> bool:
    """Whether the model predicts a text of its own, not the next tokens of what it reads."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


@torch.no_grad()
def row_losses(
    model: PreTrainedModel,
    rows: Sequence[Example],
    pad_token_id: int,
    size: int = 8,
    track: Track = quiet,
    what: str = "loss",
) -> list[tuple[float, int]]:
    """Of each row, the sum of its labels' negative log-likelihoods, in nats, and their number; in float32."""
    model.eval()
    out = [(0.0, 0)] * len(rows)
    for chunk, batch in track(batches(rows, pad_token_id, size), what):
        for i, loss, n in zip(chunk, *(t.tolist() for t in batch_losses(model, batch)), strict=True):
            out[i] = loss, int(n)
    return out


def heldout_loss(model: PreTrainedModel, rows: Sequence[Example], pad_token_id: int, size: int = 8) -> float:
    """Mean negative log-likelihood per label, in nats, over all rows: sum of losses / number of labels."""
    found = row_losses(model, rows, pad_token_id, size)
    return sum(loss for loss, _ in found) / sum(n for _, n in found)


def prompt_text(record: Record, tokenizer: Any, words: int = 12) -> str:
    """What the model is given: a conversation up to the answer, or the first words of a text."""
    if record.messages:
        turns = [dict(m) for m in record.prompt]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    lines = record.text.splitlines()
    return "\n".join(lines[:1]) if len(lines) > 2 else " ".join(record.text.split()[:words])


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int,
    size: int = 32,
    track: Track = quiet,
    what: str = "answers",
) -> list[str]:
    """Greedy continuations, without special tokens. Batches are padded on the left; prompts of like length together."""
    model.eval()
    done: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for chunk in track([order[start : start + size] for start in range(0, len(order), size)], what):
        encoded = tokenizer(
            [prompts[i] for i in chunk],
            padding=True,
            padding_side="left",
            return_tensors="pt",
            add_special_tokens=False,
        )
        inputs = {k: encoded[k].to(model.device) for k in ("input_ids", "attention_mask")}
        out_BS = cast(Any, model).generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = tokenizer.batch_decode(out_BS[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        done.update(zip(chunk, texts, strict=True))
    return [done[i] for i in range(len(prompts))]


def answer_scores(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[Record],
    scorer: Scorer,
    max_new_tokens: int = 24,
    size: int = 32,
    track: Track = quiet,
    what: str = "answers",
) -> dict[str, list[float]]:
    """What ``scorer`` says of each conversation's greedy answer, by task (``""`` for records without one)."""
    prompts = [prompt_text(r, tokenizer) for r in records]
    answers = generate(model, tokenizer, prompts, max_new_tokens, size, track, what)
    scores: dict[str, list[float]] = {}
    for record, text in zip(records, answers, strict=True):
        scores.setdefault(record.task, []).append(scorer(record, text))
    return scores


def exact_match(
    model: PreTrainedModel, tokenizer: Any, records: Sequence[Record], scorer: Scorer, max_new_tokens: int = 24
) -> dict[str, float]:
    """Share of conversations answered right, by task (``""`` for records without one)."""
    found = answer_scores(model, tokenizer, records, scorer, max_new_tokens)
    return {task: sum(s) / len(s) for task, s in found.items()}


def answer(
    model: PreTrainedModel, tokenizer: Any, prompts: Mapping[str, str], max_new_tokens: int = 32
) -> dict[str, str]:
    """One greedy answer per named prompt, each in a batch of its own so that padding plays no part."""
    return {name: generate(model, tokenizer, [text], max_new_tokens)[0] for name, text in prompts.items()}
