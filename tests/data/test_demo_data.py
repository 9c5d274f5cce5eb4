"""The demo's own domains: the same every time, no leaks, exact scorers; and what is said when a package is missing."""

from __future__ import annotations

import importlib.util

import pytest

from molora.data.builtin.domains import BUILTIN_DOMAINS, TASKS, domain_records, score_answer
from molora.data.examples import Record, apart, split
from molora.errors import ConfigError


@pytest.mark.parametrize("name", BUILTIN_DOMAINS)
def test_builtin_domains_are_the_same_every_time(name: str) -> None:
    first, second = domain_records(f"builtin:{name}"), domain_records(f"builtin:{name}")
    assert first == second
    assert len(first) >= 60
    train, held = split(first, 32, 0)
    assert not {r.group for r in train if r.group} & {r.group for r in held}
    assert not {r.text + str(r.messages) for r in train} & {r.text + str(r.messages) for r in held}


def test_both_languages_and_many_topics_and_modules() -> None:
    assert sum(" the " in r.text for r in domain_records("builtin:wiki-en")) > 1000
    assert sum(" est " in r.text for r in domain_records("builtin:wiki-fr")) > 1000
    code = domain_records("builtin:code")
    assert all("def " in r.text for r in code)
    assert sum(r.group.startswith("HumanEval/") for r in code) == 164
    assert len({r.group for r in code if not r.group.startswith("HumanEval/")}) > 40


def test_reasoning_questions_score_exactly_and_are_held_apart() -> None:
    train, held = apart(domain_records("builtin:reasoning"), domain_records("builtin:reasoning-heldout"))
    assert {r.task for r in train} == {r.task for r in held} == set(TASKS)
    assert not {r.prompt[0]["content"] for r in train} & {r.prompt[0]["content"] for r in held}
    for r in held:
        assert score_answer(r, f" {r.answer}\n") == 1
        assert score_answer(r, f"{r.answer} or so") == 0
        assert score_answer(r, "") == 0


def test_answers_without_a_scorer_are_compared() -> None:
    turns = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"})
    assert score_answer(Record(messages=turns), "yes ") == 1
    assert score_answer(Record(messages=turns), "yes!") == 0


@pytest.mark.parametrize("name", BUILTIN_DOMAINS)
def test_a_missing_package_names_the_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r": pip install 'molora\[demo\]'"):
        domain_records(f"builtin:{name}")


def test_an_unknown_builtin_domain_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'wiki-en'"):
        domain_records("builtin:wiki-em")
