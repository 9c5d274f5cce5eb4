"""Settings of DeepSpeed by name, and what the engine refuses, each with what to do."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import ConfigError
from molora.training.engine import settings as engine
from tests.support.launched import no_engine

SHIPPED = ("zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here starts an engine."""
    no_engine(monkeypatch)


def settings(**more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}, **more}


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_name_gives_its_file(name: str) -> None:
    found = engine.resolve_deepspeed(name)
    assert found is not None
    assert found["zero_optimization"]["stage"] == int(name[4])
    assert {found[key] for key in engine.COMPLETED} == {"auto"}
    assert ("offload_param" in found["zero_optimization"]) == name.endswith("offload")


def test_what_a_file_leaves_out_follows_the_arguments(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(settings(bf16={"enabled": True}, gradient_clipping=0.5)))
    found = engine.resolve_deepspeed(str(tmp_path / "mine.json"))
    assert found == settings(bf16={"enabled": True}, gradient_clipping=0.5) | {
        "fp16": {"enabled": "auto"},
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }
    assert engine.resolve_deepspeed(None) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("zeroo2", "expected zero1, zero2, zero3, zero3_offload or the path of a JSON file; did you mean 'zero2'"),
        ("nowhere.json", "got 'nowhere.json'"),
        (2, "got 2, expected zero1"),
        ("{folder}/text.json", "text.json is not JSON"),
        ("{folder}/list.json", "got list, expected an object"),
    ],
)
def test_settings_that_cannot_be_read(value: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("stage: 2")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ConfigError) as caught:
        engine.resolve_deepspeed(value.format(folder=tmp_path) if isinstance(value, str) else value)
    assert said in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "AutoTP cuts the frozen linears"),
        ({"expert_parallel": {"enabled": True, "autoep_size": 2}}, "AutoEP exchanges the base's expert blocks"),
    ],
)
def test_what_would_change_adapted_modules_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine.prepare_engine({"deepspeed": settings(**changes)})
    assert said in str(caught.value)
    assert "drop the section" in str(caught.value)


def test_parallelism_that_is_off_is_not_refused() -> None:
    off = settings(tensor_parallel={"autotp_size": 1}, expert_parallel={"enabled": False})
    assert engine.prepare_engine({"deepspeed": off})["deepspeed"].items() >= off.items()


@pytest.mark.parametrize(
    ("variable", "values", "said"),
    [
        ("ACCELERATE_USE_CPU", {"deepspeed": "zero2"}, "trains without DeepSpeed and does not say so; unset it"),
        ("ACCELERATE_USE_DEEPSPEED", {}, "give it as an argument, where it is checked: --deepspeed zero2"),
    ],
)
def test_what_accelerate_would_do_in_silence(
    monkeypatch: pytest.MonkeyPatch, variable: str, values: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv(variable, "false")
    engine.prepare_engine(values)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=said):
        engine.prepare_engine(values)


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    hide = lambda name, *more: None if name == "deepspeed" else real(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    with pytest.raises(ConfigError, match=r"deepspeed: pip install 'molora\[train\]'"):
        engine.prepare_engine({"deepspeed": "zero2"})


ADAMW = {"type": "AdamW", "params": {"lr": "auto"}}
OFFLOAD = {"stage": 2, "offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize("missing", ["ninja", "g++"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optimizer": ADAMW}, 'drop that section and use `optim`, or set "torch_adam": true in its params'),
        ({"optimizer": {"type": "Lion"}}, "drop that section and use `optim`"),
        ({"zero_optimization": OFFLOAD}, 'set "zero_force_ds_cpu_optimizer": false'),
    ],
)
def test_an_optimizer_that_must_be_compiled(
    monkeypatch: pytest.MonkeyPatch, missing: str, changes: dict[str, Any], said: str
) -> None:
    engine.prepare_engine({"deepspeed": settings(**changes)})
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == missing else tool)
    with pytest.raises(ConfigError) as caught:
        engine.prepare_engine({"deepspeed": settings(**changes)})
    assert f"{missing} cannot be found on PATH" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("given", [*SHIPPED, settings(optimizer={**ADAMW, "params": {"torch_adam": True}})])
def test_the_rest_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, given: Any) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    assert engine.prepare_engine({"deepspeed": given})["deepspeed"]["zero_optimization"]["stage"] >= 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with an accelerator, use_cpu: false is the usual thing")
def test_several_processes_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine.prepare_engine({"use_cpu": "false"})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes would each train alone"):
        engine.prepare_engine({"use_cpu": "false"})
