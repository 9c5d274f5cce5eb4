"""Local tasks of lm-evaluation-harness, one of each kind, over JSON lines, and an adapter to run them on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import datasets
import lm_eval
import transformers as tf
import yaml
from lm_eval.tasks import TaskManager

import molora
from tests.support.tiny import arm
from tests.support.tiny_text import jsonl, model_folder

# Texts of unlike lengths, some with the token 0 ("!") at their end: it must not be taken for padding.
QUESTIONS: list[dict[str, Any]] = [
    {"question": "2+2?", "choices": ["3", "four!!", "22"], "answer": 1},
    {"question": "Say it!", "choices": ["!", "!!", "!?", "!!!", "no"], "answer": 2},
    {"question": "the sky is", "choices": ["blue", "a very long and winding road"], "answer": 0},
    {"question": "x", "choices": ["yes", "yet"], "answer": 1},
    {"question": "to be or", "choices": ["not", "not to be", "!"], "answer": 1},
]
TEXTS = ["to be or not to be! " * 20, "one!", "one!!"]  # the first has several windows
ANSWER = 12  # tokens
STOPS = ["H", "CC"]  # what the tiny model comes to say of itself, for some prompts
PROMPTS = ["a", "a much longer prompt!", "some", "four letters", "!"]


def write_tasks(folder: Path, questions: list[dict[str, Any]] = QUESTIONS) -> Path:
    """``choices``, ``texts`` and ``answers`` as YAML files."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {
        "choices": questions,
        "texts": [{"text": t} for t in TEXTS],
        "answers": [{"prompt": p, "said": "x"} for p in PROMPTS],
    }
    own: dict[str, dict[str, Any]] = {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "byte_perplexity"}],
        },
        "answers": {
            "output_type": "generate_until",
            "doc_to_text": "prompt",
            "doc_to_target": "said",
            "generation_kwargs": {"until": STOPS, "max_gen_toks": ANSWER},
            "metric_list": [{"metric": "exact_match"}],
        },
    }
    for name, lines in rows.items():
        data = jsonl(folder / f"{name}.jsonl", lines)
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(shared | own[name]))
    return folder


class Place(NamedTuple):
    """The folders of an adapter, which names its base, and of tasks."""

    adapter: Path
    tasks: Path


def tiny_place(root: Path) -> Place:
    """An armed mixture of four experts on the tiny model of bytes."""
    base = tf.AutoModelForCausalLM.from_pretrained(model_folder(root / "base"))
    molora.convert(base, "mixlora", r=4, lora_alpha=8, num_experts=4)
    arm(base)
    base.save_pretrained(root / "adapter")
    return Place(root / "adapter", write_tasks(root / "tasks"))


def loaded(place: Place) -> Any:
    """The adapter on its base."""
    return molora.from_pretrained(place.adapter).eval()


def evaluate(lm: Any, place: Place, *names: str) -> dict[str, Any]:
    """What lm-eval returns for the tasks, in this process."""
    manager = TaskManager(include_path=str(place.tasks), include_defaults=False)
    with mock.patch.object(datasets.config, "HF_DATASETS_CACHE", place.tasks / "cache"):
        found = lm_eval.simple_evaluate(lm, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    return dict(found)


def numbers(found: dict[str, Any], task: str) -> dict[str, float]:
    """A task's scores by name."""
    return {k: v for k, v in found["results"][task].items() if isinstance(v, float) and "stderr" not in k}
