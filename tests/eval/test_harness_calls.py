"""How lm-evaluation-harness is started on an adapter: from the command line, by name, and with mistakes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import lm_eval.__main__
import pytest
import torch
import transformers as tf
from lm_eval.api.registry import Registry, model_registry
from lm_eval.models.huggingface import HFLM

import molora
from molora.data.builtin.model import model_folder as real_model
from molora.errors import AdapterError, ConfigError
from molora.eval import harness
from molora.eval.harness_model import MoloraLM
from molora.eval.scoring.choices import likelihoods, read_choices
from tests.support.lm_tasks import Place, evaluate, loaded, numbers, tiny_place, write_tasks
from tests.support.places import ROOT
from tests.support.tiny import arm, write_adapter
from tests.support.tiny_text import model_folder
from tests.support.tolerances import close

LIMIT = 240  # seconds; lm-eval alone takes 20 to start on a busy machine
FACTS: list[dict[str, Any]] = [
    {"question": "The capital of France is", "choices": ["Rome", "Paris", "the river Thames"], "answer": 1},
    {"question": "The opposite of hot is", "choices": ["cold", "very much hotter"], "answer": 0},
    {"question": "Dogs like to chase", "choices": ["integrals", "cats", "Tuesday"], "answer": 1},
    {"question": "One, two, three,", "choices": ["four", "nine", "purple"], "answer": 0},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return tiny_place(tmp_path_factory.mktemp("harness"))


def command(place: Place, out: Path, *tasks: str, more: str = "") -> subprocess.CompletedProcess[str]:
    """lm-eval's command line on an adapter folder."""
    arguments = ["--model", "molora", "--model_args", f"pretrained={place.adapter},dtype=float32{more}"]
    arguments += ["--tasks", ",".join(tasks), "--include_path", str(place.tasks), "--batch_size", "4"]
    env = {**os.environ, "HF_DATASETS_CACHE": str(out / "cache"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "molora.eval.harness", *arguments, "--output_path", str(out / "results")],
        capture_output=True, text=True, timeout=LIMIT, check=False, env=env, cwd=out,
    )  # fmt: skip


def check_command(place: Place, out: Path, *tasks: str) -> dict[str, Any]:
    """The command's scores are those of lm-eval's own model in this process; returns the evaluation document."""
    done = command(place, out, *tasks, more=f",routing={out}/evaluation.json")
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (out / "results").rglob("results_*.json")
    found = json.loads(file.read_text())
    expected = evaluate(HFLM(pretrained=loaded(place), batch_size=4), place, *tasks)
    for task in tasks:
        assert numbers(found, task) == pytest.approx(numbers(expected, task), rel=1e-5)
    document: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    assert set(document["routing"]["load"]) == set(tasks)
    return document


@pytest.mark.slow
def test_the_command_line_on_a_tiny_model(place: Place, tmp_path: Path):
    document = check_command(place, tmp_path, "choices", "texts")
    assert document["name"] == "adapter"
    assert document["routing"]["domains"]["texts"]["documents"] == 3


@pytest.mark.slow
def test_the_command_line_on_a_real_model(tmp_path: Path):
    folder = real_model("builtin:smollm2")
    base: Any = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    arm(molora.convert(base, "mixlora", r=4, num_experts=4))
    with torch.no_grad():
        for name, p in base.named_parameters():
            if name.endswith("lora_B"):
                p.mul_(0.02)  # so that it still speaks English
    base.save_pretrained(tmp_path / "adapter")
    place = Place(tmp_path / "adapter", write_tasks(tmp_path / "tasks", FACTS))
    document = check_command(place, tmp_path, "choices", "texts")
    right = evaluate(HFLM(pretrained=base, batch_size=4), place, "choices")
    assert numbers(right, "choices")["acc,none"] >= 0.75
    own = likelihoods(base, tf.AutoTokenizer.from_pretrained(folder), read_choices(place.tasks / "choices.jsonl"))
    theirs = [value for sample in right["samples"]["choices"] for ((value, _),) in sample["resps"]]
    close(torch.tensor([v for values in own for v in values]), torch.tensor(theirs), "real_model_fp32")
    assert len(document["routing"]["sites"]) == 30


def test_a_mistake_on_the_command_line_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: model_registry.get("molora")(str(tmp_path)))
    with pytest.raises(SystemExit) as caught:
        harness.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}")
    assert said.count("\n") == 1


def test_the_entry_point_names_the_model():
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    (given,) = groups["lm_eval.models"].items()
    registry: Registry[Any] = Registry("model")
    registry.register(given[0], target=EntryPoint(*given, "lm_eval.models"))
    assert registry.get("molora") is MoloraLM


# -------------------------------------------------------------------------------------------------------- mistakes


def _other_base(place: Place, out: Path) -> Any:
    config = tf.LlamaConfig.from_pretrained(place.adapter.parent / "base", intermediate_size=64)
    tf.LlamaForCausalLM(config).save_pretrained(out)
    tf.AutoTokenizer.from_pretrained(place.adapter.parent / "base").save_pretrained(out)
    return MoloraLM(str(place.adapter), base=str(out))


def _nameless(place: Place, out: Path) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(place.adapter.parent / "base")
    model.config._name_or_path = ""
    molora.convert(model, "mola", r=4).save_pretrained(out)
    return MoloraLM(str(out))


def _without_experts(place: Place, out: Path) -> Any:
    model = tf.AutoModelForCausalLM.from_pretrained(place.adapter.parent / "base")
    return MoloraLM(molora.convert(model, "lora", r=4), routing=out / "e.json")


MISTAKES: dict[str, tuple[Callable[[Place, Path], Any], type[Exception], str]] = {
    "a folder without an adapter": (lambda _, out: MoloraLM(str(out)), AdapterError, "expected an adapter folder"),
    "that, with a base": (lambda p, out: MoloraLM(str(out), base="x"), AdapterError, "expected an adapter folder"),
    "an adapter for another base": (_other_base, AdapterError, "made for another base model; .*config_sha256"),
    "an adapter that names no base": (_nameless, AdapterError, "names no base model; give it as base=FOLDER"),
    "no base there": (lambda p, out: MoloraLM(str(p.adapter), base=f"{out}/no"), ConfigError, "no cannot be loaded"),
    "a plain model": (lambda p, _: MoloraLM(loaded(p).unload()), ConfigError, "got a plain LlamaForCausalLM"),
    "a model and a base": (lambda p, _: MoloraLM(loaded(p), base="x"), ConfigError, "got one beside a model"),
    "no choice to count": (_without_experts, ConfigError, "routing: .* no router with a choice"),
    "a folder to write": (lambda p, out: MoloraLM(loaded(p), routing=out), ConfigError, "is a folder, expected a file"),
    "too early": (lambda p, _: MoloraLM(loaded(p)).evaluation(), ConfigError, "nothing was counted; give routing="),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case: str, place: Place, tmp_path: Path):
    make, kind, message = MISTAKES[case]
    with pytest.raises(kind, match=message) as caught:
        make(place, tmp_path)
    assert re.match(r"[^\n]{20,400}(\n|$)", str(caught.value))


def test_a_peft_lora_folder_with_its_base(tmp_path: Path):
    model_folder(tmp_path / "base")
    write_adapter(tmp_path / "lora", "llama", r=4, seed=1, only=("q_proj",))
    assert MoloraLM(str(tmp_path / "lora"), base=str(tmp_path / "base")).model._molora.config.recipe == "lora"
