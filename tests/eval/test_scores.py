"""Scores: each number against a loop of one row at a time, and cases small enough to work out by hand."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from molora.data.examples import Record, encode
from molora.errors import ConfigError
from molora.eval.ledger import Ledger
from molora.eval.scoring.bootstrap import ratio_bounds
from molora.eval.scoring.choices import Choice, choice_rows, likelihoods, picks, read_choices
from molora.eval.scoring.losses import generate, prompt_text
from molora.eval.scoring.section import document_losses, scores
from tests.support.tiny_text import jsonl, model_folder, tokenizer

TEXTS = [Record(text=t) for t in ("to be or not to be, that is the question: " * 3, "one two", "x" * 40)]
QUESTION = {"question": "2+2?", "choices": ["3", "four", "22"], "answer": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tf.PreTrainedModel:
    return tf.AutoModelForCausalLM.from_pretrained(model_folder(tmp_path_factory.mktemp("model")))


def chat(question: str, answer: str, task: str = "") -> Record:
    turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    return Record(messages=turns, task=task)


def equal(record: Record, text: str) -> float:
    return float(record.answer == text)


# ------------------------------------------------------------------------------------------------------------- bounds


def test_bounds_of_documents_by_hand() -> None:
    """Two documents: a resample is one of them twice, or both, with a quarter, a quarter and a half of the chance."""
    found = ratio_bounds([1.0, 30.0], [10, 10], resamples=400, seed=3)
    assert found == {"value": 1.55, "low": 0.1, "high": 3.0}
    assert ratio_bounds([6.0], [4]) == {"value": 1.5, "low": 1.5, "high": 1.5}


def test_bounds_hold_the_truth_as_often_as_they_say() -> None:
    """Documents of unequal length whose tokens share a loss; the true mean a token is 2 by construction."""
    generator, held = torch.Generator().manual_seed(0), 0
    for trial in range(200):
        tokens = torch.randint(5, 50, (60,), generator=generator)
        sums = tokens * (2 + torch.randn(60, generator=generator))
        found = ratio_bounds(sums.tolist(), tokens.tolist(), 200, trial)
        held += found["low"] <= 2 <= found["high"]
    assert 180 <= held <= 199  # 95 %, give or take three standard deviations and the resamples' own


# --------------------------------------------------------------------------------------------------------- perplexity


def test_a_document_is_all_its_windows(model: Any) -> None:
    expected = []
    for record in TEXTS:
        loss, tokens = 0.0, 0
        for row in encode(record, tokenizer(), 32):
            ids = torch.tensor([row["input_ids"]])
            with torch.no_grad():
                logp_SV = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            loss -= sum(logp_SV[i, t].item() for i, t in enumerate(row["input_ids"][1:]))
            tokens += len(row["input_ids"]) - 1
        expected.append((loss, tokens))
    found = document_losses(model, tokenizer(), TEXTS, 32, size=3)
    assert [n for _, n in found] == [n for _, n in expected]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    section = scores(model, tokenizer(), domains={"verse": TEXTS}, scorer=equal, max_length=32)
    said, total, tokens = section["perplexity"]["verse"], sum(x for x, _ in found), sum(n for _, n in found)
    assert said["loss"]["value"] == pytest.approx(total / tokens, abs=1e-6)
    assert said["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-6)
    assert (said["tokens"], said["documents"]) == (tokens, 3)
    assert said["loss"]["low"] < said["loss"]["value"] < said["loss"]["high"]
    assert section.keys() == {"schema", "perplexity"}


def test_a_domain_without_a_token_to_predict_is_named(model: Any) -> None:
    with pytest.raises(ConfigError, match="empty: no record has a token to predict"):
        scores(model, tokenizer(), domains={"empty": []}, scorer=equal)


# ----------------------------------------------------------------------------------------------------- multiple choice


def test_choices_are_scored_by_their_own_tokens(model: Any) -> None:
    questions = [Choice("2+2? ", ("3", "four", "22"), 1), Choice("a\n\n", ("bc", "b"), 0)]
    found = likelihoods(model, tokenizer(), questions, size=2)
    for q, values in zip(questions, found, strict=True):
        for text, value in zip(q.choices, values, strict=True):
            asked = tokenizer()(q.prompt.rstrip()).input_ids
            whole = tokenizer()(q.prompt + text).input_ids
            with torch.no_grad():
                logp_SV = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
            slow = sum(logp_SV[i - 1, whole[i]].item() for i in range(len(asked), len(whole)))
            assert value == pytest.approx(slow, rel=1e-5)


def test_the_longer_of_two_choices_wins_by_character() -> None:
    questions = [Choice("", ("abcd", "x"), 0), Choice("", ("abcd", "x"), 1), Choice("", ("a", "b"), 0)]
    assert picks(questions, [[-4.0, -3.0], [-4.0, -3.0], [-1.0, -1.0]]) == [(False, True), (True, False), (True, True)]


def test_a_question_too_long_for_the_model_loses_its_beginning(model: Any) -> None:
    long = Choice("z" * 300 + "2+2? ", ("3", "four"), 0)
    assert [len(row["input_ids"]) for row in choice_rows([long], tokenizer(), 256)] == [256, 256]
    assert likelihoods(model, tokenizer(), [long])[0][0] < 0
    with pytest.raises(ConfigError, match=r"'zzz.*' has 300 tokens .* at most 255"):
        choice_rows([Choice("why? ", ("z" * 299, "x"), 0)], tokenizer(), 256)


def test_answers_by_index_text_and_letter(tmp_path: Path) -> None:
    lines = [
        QUESTION,
        QUESTION | {"answer": "22"},
        QUESTION | {"answer": "C"},
        {"context": "2+2=", "choices": ["A", "B", "C"], "answer": "B"},
        {"question": "Which?", "choices": ["B", "A"], "answer": "A"},
    ]
    path = tmp_path / "q.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl(tmp_path / "q", lines).read_bytes()))
    found = read_choices(path)
    assert [q.answer for q in found] == [1, 2, 2, 1, 1]
    assert [q.prompt for q in found[2:4]] == ["2+2? ", "2+2="]
    assert found[3].where == f"{path}:4"


BAD = {
    "a broken line": ('{"question": "a', r"not JSON: .* at column 14"),
    "a list": ("[1]", "got a JSON list, expected an object"),
    "no choices": ({"question": "a", "answer": 0}, "got 'question', 'answer', expected .*'choices'"),
    "both kinds of prompt": (QUESTION | {"context": "a"}, "got .*, expected one of 'question' and 'context'"),
    "an empty question": (QUESTION | {"question": " "}, "'question': got ' ', expected a non-empty string"),
    "one choice": (QUESTION | {"choices": ["a"]}, "'choices': .* at least two"),
    "an empty choice": (QUESTION | {"choices": ["a", ""]}, "'choices': .* non-empty"),
    "an index too far": (QUESTION | {"answer": 3}, "'answer': got 3, expected an index from 0 to 2"),
    "an index below": (QUESTION | {"answer": -1}, "'answer': got -1"),
    "a letter too far": (QUESTION | {"answer": "D"}, "'answer': got 'D', .* letter from A to C"),
    "no index at all": (QUESTION | {"answer": True}, "'answer': got True"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named_by_file_and_number(case: str, tmp_path: Path) -> None:
    line, message = BAD[case]
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(QUESTION) + "\n\n" + (line if isinstance(line, str) else json.dumps(line)) + "\n")
    with pytest.raises(ConfigError, match=f"^{path}:3: {message}") as caught:
        read_choices(path)
    assert "\n" not in str(caught.value)


def test_a_missing_or_empty_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.jsonl does not exist; expected a file of JSON lines$"):
        read_choices(tmp_path / "none.jsonl")
    with pytest.raises(ConfigError, match="has no records"):
        read_choices(jsonl(tmp_path / "empty.jsonl", []))


# ------------------------------------------------------------------------------------------------- all of it, resumed


def test_exact_match_goes_by_task_over_domains_and_by_domain_without_one(model: Any) -> None:
    said = generate(model, tokenizer(), [prompt_text(chat("q", "x"), tokenizer())], 6)[0]
    domains = {"a": [chat("q", said, "sums"), chat("q", "no", "sums")], "b": [chat("q", said, "sums"), chat("q", said)]}
    found = scores(model, tokenizer(), domains=domains, scorer=equal, max_new_tokens=6)["exact_match"]
    assert found["sums"]["value"] == pytest.approx(2 / 3, abs=1e-6)
    assert (found["sums"]["questions"], found["b"]["questions"]) == (3, 1)
    assert found["b"] == {"value": 1.0, "low": 1.0, "high": 1.0, "questions": 1}


def test_a_run_that_was_cut_off_goes_on_and_says_the_same(model: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", [QUESTION, QUESTION | {"choices": ["3", "4"], "answer": "4"}])
    job = {"choices": {"sums": read_choices(path)}, "scorer": equal, "max_length": 32, "max_new_tokens": 4}
    domains = {"verse": TEXTS, "chat": [chat("2+2", "4")]}
    whole = scores(model, tokenizer(), domains=domains, **job)
    assert whole["multiple_choice"]["sums"]["questions"] == 2
    assert whole["multiple_choice"]["sums"]["chance"] == pytest.approx(5 / 12, abs=1e-6)
    assert json.loads(json.dumps(whole)) == whole
    with pytest.raises(ZeroDivisionError):
        scores(model, tokenizer(), domains=domains, **job | {"scorer": lambda *_: 1 / 0}, ledger=Ledger(tmp_path / "l"))
    left = Ledger(tmp_path / "l")
    assert len((tmp_path / "l").read_text().splitlines()) == 1 + 3  # the job; two perplexities and the choices
    calls: list[int] = []
    with_count = model.register_forward_hook(lambda *_: calls.append(1))
    assert scores(model, tokenizer(), domains=domains, **job, ledger=left) == whole
    with_count.remove()
    assert len(calls) == 4  # the four tokens of the one answer
