"""Held-out loss and greedy answers against transformers' own, one row at a time."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from molora.data.examples import IGNORED, Example, Record
from molora.eval.scoring.losses import answer, exact_match, generate, heldout_loss, prompt_text
from tests.support.tiny_text import model_folder, tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(model_folder(tmp_path_factory.mktemp("model")))


def test_loss_is_the_mean_over_labels_whatever_the_batches(model: tf.PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in (5, 12, 8):
        ids = torch.randint(0, 250, (n,), generator=generator).tolist()
        rows.append(Example(input_ids=ids, labels=[IGNORED] * 3 + ids[3:]))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
            n = int((labels[:, 1:] != IGNORED).sum())
            total, count = total + n * model(input_ids=ids, labels=labels).loss.item(), count + n
    for size in (1, 2, 8):
        assert heldout_loss(model, rows, tokenizer().pad_token_id, size) == pytest.approx(total / count, rel=1e-5)


def test_batched_answers_are_those_of_single_prompts(model: tf.PreTrainedModel) -> None:
    prompts = ["a", "a much longer prompt", "some", "four letters"]
    single = answer(model, tokenizer(), dict(zip("abcd", prompts, strict=True)), 8)
    assert generate(model, tokenizer(), prompts, 8, size=3) == list(single.values())


def test_exact_match_by_task(model: tf.PreTrainedModel) -> None:
    def record(task: str, right: str) -> Record:
        turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": right})
        return Record(messages=turns, task=task)

    said = generate(model, tokenizer(), [prompt_text(record("", "x"), tokenizer())], 6)[0]
    records = [record("one", said), record("one", "no"), record("two", said)]
    scores = exact_match(model, tokenizer(), records, lambda r, text: float(text == r.answer), 6)
    assert scores == {"one": 0.5, "two": 1.0}


def test_prompts() -> None:
    t = tokenizer()
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert prompt_text(Record(messages=turns), t) == "<|user|>q<|end|>\n<|assistant|>"
    assert prompt_text(Record(text="one two three four"), t, words=2) == "one two"
    assert prompt_text(Record(text="def f(x):\n    return x\n\n"), t) == "def f(x):"
