"""The CPU benchmark on a tiny model: what it measures, refuses and writes. No assertion looks at a time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from rich.progress import Progress

from benchmarks import cpu, memory, subjects, timing

TINY = tf.LlamaConfig(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    vocab_size=40000,  # the benchmark draws its tokens below this
    max_position_embeddings=256,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark's base replaced by a tiny Llama, and few experts."""
    model = tf.LlamaForCausalLM(TINY).requires_grad_(False).eval()
    monkeypatch.setattr(subjects, "base", lambda: model)
    monkeypatch.setattr(cpu, "EXPERTS", (4, 8))
    monkeypatch.setattr(subjects, "TOKENS", 40)
    subjects.adapter_folders.cache_clear()
    yield model
    subjects.adapter_folders.cache_clear()


@pytest.mark.slow
def test_quick_run_writes_figures_and_machine(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "200")  # ratios of tiny models vary in width, and a narrow table breaks the names
    out = tmp_path / "deep" / "result.json"
    assert cpu.main(out=out, check=False, quick=True) == 0
    result = json.loads(out.read_text())
    assert {"date", "machine", "threads", "figures", "curve", "seconds", "wall_s"} <= result.keys()
    assert {"cpu", "cores", "memory_gib", "python", "versions", "commit"} <= result["machine"].keys()
    assert {"torch", "transformers", "peft"} <= result["machine"]["versions"].keys()
    assert [row["experts"] for row in result["curve"]] == [4, 8]
    for f in result["figures"]:
        assert f["met"] == (f["value"] >= f["goal"] if f["at_least"] else f["value"] <= f["goal"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("MoLA training step", "K=2 over K=1", "X-LoRA generation", "rank products"))


@pytest.mark.parametrize(("check", "value", "code"), [(True, 1.0, 0), (True, 3.0, 1), (False, 3.0, 0)])
def test_check_fails_on_a_missed_line_only(
    check: bool, value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    record = {"curve": [], "peft_xlora_forward_over_base": 4.0}
    monkeypatch.setattr(cpu, "measure", lambda quick, progress: ([cpu.Line("a figure", value, 2.0)], record))
    assert cpu.main(out=tmp_path / "r.json", check=check) == code


@pytest.mark.parametrize(
    ("value", "at_least", "met"),
    [(1.0, False, True), (2.0, False, True), (2.1, False, False), (1.9, True, False), (2.0, True, True)],
)
def test_a_line_is_met_up_to_its_goal(value: float, at_least: bool, met: bool):
    assert cpu.Line("x", value, 2.0, at_least).met == met


def test_nothing_is_timed_when_outputs_disagree(tiny: Any, monkeypatch: pytest.MonkeyPatch):
    """One gate off by a little is enough; with equal heads the same pair agrees."""
    ours, theirs = subjects.xlora(), subjects.peft_xlora()
    assert cpu.agree(ours, theirs) < 1e-4
    monkeypatch.setattr(subjects, "same_head", lambda ours, theirs: None)
    with torch.no_grad():
        ours.molora_router.layers[-1].bias += torch.linspace(-3, 3, ours.molora_router.layers[-1].bias.numel())
    with pytest.raises(AssertionError, match="not timed"):
        cpu.agree(ours, theirs)


@pytest.mark.parametrize("name", list(subjects.SUBJECTS))
def test_every_subject_runs_armed(tiny: Any, name: str):
    """Each subject of the memory table is built and runs; every B that it holds is non-zero."""
    before = {p: t.clone() for p, t in tiny.state_dict().items()}
    subjects.SUBJECTS[name]()()
    assert all(torch.equal(t, before[p]) for p, t in tiny.state_dict().items()), "the shared base weights changed"


@pytest.mark.parametrize("build", ["mola", "mixlora", "peft_lora", "xlora", "peft_xlora"])
def test_experts_are_armed(tiny: Any, build: str):
    weights = [p for n, p in getattr(subjects, build)().named_parameters() if "lora_B" in n]
    assert weights
    assert all(bool(p.any()) for p in weights)


def test_generation_has_the_asked_length(tiny: Any):
    assert subjects.generation(subjects.xlora(), 5)().shape == (1, 37)


def test_work_is_interleaved_and_the_first_round_does_not_count():
    calls: list[str] = []
    work = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    with Progress(disable=True) as progress:
        seconds = timing.interleaved(work, 3, progress, "test")
    assert calls == ["a", "b"] * 4
    assert {k: len(v) for k, v in seconds.items()} == {"a": 3, "b": 3}


def test_ratio_is_the_median_of_ratios_within_rounds():
    assert timing.ratio({"a": [2.0, 30.0, 9.0], "b": [1.0, 10.0, 1.0]}, "a", "b") == 3.0


def test_memory_is_that_of_a_fresh_process_with_a_time_limit(monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}

    def run(command: list[str], **options: Any) -> Any:
        seen.update(options, command=command)
        return SimpleNamespace(stdout='loading\n{"peak_mib": 12.5}\n')

    monkeypatch.setattr(subprocess, "run", run)
    assert memory.peak_mib("base forward") == 12.5
    assert seen["command"][1:] == ["-m", "benchmarks.memory", "base forward"]
    assert seen["check"]
    assert seen["timeout"] == memory.LIMIT_S
