"""lm-evaluation-harness on an adapter, in this process: the scores of its own model, and routing by task."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.models.huggingface import HFLM

from molora.eval.counting.inputs import digest_of
from molora.eval.counting.metrics import assignment_counts
from molora.eval.counting.tape import record_routing
from molora.eval.harness_model import MoloraLM
from molora.eval.harness_rows import fed_tokens
from molora.eval.scoring.choices import read_choices
from molora.eval.scoring.section import scores
from tests.support.lm_tasks import (
    ANSWER,
    PROMPTS,
    QUESTIONS,
    STOPS,
    TEXTS,
    Place,
    evaluate,
    loaded,
    numbers,
    tiny_place,
)
from tests.support.tiny_text import tokenizer
from tests.support.tolerances import close


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return tiny_place(tmp_path_factory.mktemp("harness"))


# --------------------------------------------------------------------------------------------------------------- scores


@pytest.mark.parametrize("size", [1, 3])
def test_scores_are_those_of_lm_evals_own_hf_model(place: Place, size: int):
    ours = evaluate(MoloraLM(str(place.adapter), batch_size=size), place, "choices", "texts", "answers")
    plain = evaluate(HFLM(pretrained=loaded(place), batch_size=size), place, "choices", "texts", "answers")
    for task in ("choices", "texts", "answers"):
        assert numbers(ours, task) == pytest.approx(numbers(plain, task), rel=1e-5), task
        for a, b in zip(ours["samples"][task], plain["samples"][task], strict=True):
            if task == "answers":
                assert a["resps"] == b["resps"]
            else:
                flat = [torch.tensor([r[0][0] if task == "choices" else r[0] for r in s["resps"]]) for s in (a, b)]
                close(*flat, "same_math_fp32")


def test_our_own_multiple_choice_gives_the_same_numbers(place: Place):
    model, questions = loaded(place), read_choices(place.tasks / "choices.jsonl")
    own = scores(model, tokenizer(), domains={}, choices={"c": questions}, scorer=lambda *_: 0.0)
    theirs = numbers(evaluate(HFLM(pretrained=model), place, "choices"), "choices")
    assert own["multiple_choice"]["c"]["accuracy"]["value"] == pytest.approx(theirs["acc,none"], abs=1e-6)
    assert own["multiple_choice"]["c"]["accuracy_normalised"]["value"] == pytest.approx(
        theirs["acc_norm,none"], abs=1e-6
    )


# -------------------------------------------------------------------------------------------------------------- routing


def slow_rows(model: Any, longest: int, once: bool) -> list[tuple[str, int, list[int]]]:
    """Task, document and tokens of every row, as lm-eval makes them of texts longer than ``longest``, too."""
    tok, rows, seen, ended = tokenizer(), list[tuple[str, int, list[int]]](), set(), 0
    for i, q in enumerate(QUESTIONS):
        for choice in q["choices"]:
            ids = tok(f"{q['question']} {choice}").input_ids[:-1]
            if tuple(ids) not in seen or not once:  # lm-eval keeps its logits for choices that differ in the last token
                rows.append(("choices", i, ids[-longest:]))
            seen.add(tuple(ids))
    for i, text in enumerate(TEXTS):
        ids = [tok.eos_token_id, *tok(text).input_ids]
        for end in range(longest, len(ids) - 1 + longest, longest):
            stop = min(end, len(ids) - 1)
            rows.append(("texts", i, ids[max(stop - longest, 0) : stop]))
    for i, prompt in enumerate(PROMPTS):
        ids = tok(prompt, return_tensors="pt").input_ids[:, -(longest - ANSWER) :]
        said = model.generate(input_ids=ids, max_new_tokens=ANSWER, do_sample=False)[0].tolist()
        new = said[ids.shape[1] :]
        ends = [n for n in range(len(new)) if any(stop in tok.decode(new[: n + 1]) for stop in STOPS)]
        ended += bool(ends)
        rows.append(("answers", i, said[: ids.shape[1] + min([*ends, len(new) - 1])]))  # the last is never fed
    assert 1 < ended < len(PROMPTS)
    return rows


def slow_counts(model: Any, rows: list[tuple[str, int, list[int]]]) -> Counter[tuple[str, int, str, int]]:
    """Assignments by (task, document, site, expert), a row at a time: no batch, no padding."""
    out = Counter[tuple[str, int, str, int]]()
    for task, i, ids in rows:
        with torch.no_grad(), record_routing(model) as tape:
            model(input_ids=torch.tensor([ids]))
        for site, (r,) in tape.items():
            if r.num_experts > 1:
                for e, n in enumerate(assignment_counts(r.weights, r.ids, r.valid, r.num_experts, 1)[0].tolist()):
                    out[task, i, site, e] += int(n)
    return out


@pytest.mark.parametrize(("longest", "once"), [(256, True), (30, False)])
def test_routing_is_counted_by_task_and_document_without_padding(
    longest: int, once: bool, place: Place, tmp_path: Path
):
    file = tmp_path / "new" / "evaluation.json"
    lm = MoloraLM(str(place.adapter), routing=file, batch_size=4, max_length=longest, logits_cache=once)
    evaluate(lm, place, "choices", "texts", "answers")
    model = loaded(place)
    expected = {k: n for k, n in slow_counts(model, slow_rows(model, longest, once)).items() if n}
    numbers_of = {digest_of(f"{task}/{i}"): i for task in ("choices", "texts", "answers") for i in range(5)}
    found = {}
    for (task, digest), counts in lm.stats.units.items():
        for m, site in enumerate(lm.stats.sites):
            for e, n in enumerate(counts[lm.stats.columns(m)].tolist()):
                if n:
                    found[task, numbers_of[digest], site.path, e] = int(n)
    assert found == expected
    document = json.loads(file.read_text())
    assert document == json.loads(json.dumps(lm.evaluation()))
    assert {k: v["documents"] for k, v in document["routing"]["domains"].items()} == {
        "answers": 5, "choices": 5, "texts": 3,
    }  # fmt: skip
    words = [i for site in document["routing"]["vocabulary"] for own in site["words"] for i, _, _ in own]
    assert words
    assert all(document["tokens"][str(i)] == tokenizer().decode([i]) for i in words)


def test_an_answer_ends_with_its_end_token_its_stop_or_its_last_token():
    def decode(ids: list[int]) -> str:
        return "".join(chr(i) for i in ids)

    said = [ord(c) for c in "abcabc"]
    assert fed_tokens(said, {0}, [""], decode) == 5
    assert fed_tokens([*said[:3], 0, 0, 0], {0}, ["x"], decode) == 3
    assert fed_tokens(said, {0}, ["ca", "bca"], decode) == 3
    assert fed_tokens([], {0}, ["x"], decode) == 0


@pytest.mark.slow
def test_a_batch_size_that_lm_eval_finds_by_trying_counts_no_trial(place: Place, tmp_path: Path):
    fixed = MoloraLM(str(place.adapter), routing=tmp_path / "a.json", batch_size=4, max_length=128)
    auto = MoloraLM(
        str(place.adapter), routing=tmp_path / "b.json", batch_size="auto", max_batch_size=2, max_length=128
    )
    for lm in (fixed, auto):
        evaluate(lm, place, "choices", "texts", "answers")
    assert {k: v.tolist() for k, v in auto.stats.units.items()} == {k: v.tolist() for k, v in fixed.stats.units.items()}


def test_a_converted_model_as_it_is(place: Place, tmp_path: Path):
    lm = MoloraLM(loaded(place), routing=tmp_path / "e.json", batch_size=2)
    assert numbers(evaluate(lm, place, "choices"), "choices")
    assert list(lm.evaluation()["routing"]["domains"]) == ["choices"]
