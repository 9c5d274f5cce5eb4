"""What the engine refuses, each with what to do; settings by name; batch sizes for the processes at hand; the line."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from molora.errors import ConfigError
from molora.training import engine
from molora.training.arguments import Arguments, read_arguments
from molora.training.processes import describe_engine

SHIPPED = ("zero1", "zero2", "zero3", "zero3_offload")


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment, a compiler, and no process group: nothing here starts an engine."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "CXX", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(engine, "prepare_cpu_engine", lambda: None)
    monkeypatch.setattr(engine, "_world_of_one", lambda: None)


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
    with pytest.raises(ConfigError, match=r"deepspeed is not installed: pip install 'molora\[train\]'"):
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


# --------------------------------------------------------------------------------------------------------- batch sizes


@pytest.mark.parametrize(("world", "micro", "steps"), [(1, 8, 8), (2, 8, 4), (8, 8, 1), (3, "4", 5)])
def test_a_global_batch_gives_the_accumulation(
    monkeypatch: pytest.MonkeyPatch, world: int, micro: Any, steps: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    total = int(micro) * steps * world
    values = engine.prepare_engine({"global_batch_size": str(total), "per_device_train_batch_size": micro})
    assert values["gradient_accumulation_steps"] == steps


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"global_batch_size": 64}, "expected a multiple of 24: 8 rows (per_device_train_batch_size) x 3 processes"),
        ({"global_batch_size": 64}, "take 48 or 72"),
        ({"global_batch_size": 5}, "take 24"),
        ({"global_batch_size": -24}, "got -24, expected a multiple of 24"),
        ({"global_batch_size": 24, "gradient_accumulation_steps": 1}, "got both; the first computes the second"),
    ],
)
def test_a_global_batch_that_does_not_divide(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, Any], said: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError) as caught:
        engine.prepare_engine(values)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "world", "said"),
    [
        ({"train_batch_size": 32}, 2, "train_batch_size is 32 but 4 rows x 2 accumulated x 2 processes are 16"),
        ({"train_batch_size": 32}, 2, "(gradient_accumulation_steps 4 gives it)"),
        ({"train_batch_size": 32}, 3, "(no accumulation gives it)"),
        ({"train_micro_batch_size_per_gpu": 8}, 1, "train_micro_batch_size_per_gpu is 8 but"),
        (
            {"gradient_accumulation_steps": 1},
            1,
            "gradient_accumulation_steps is 1 but gradient_accumulation_steps is 2",
        ),
        ({"gradient_clipping": 0.5}, 1, "gradient_clipping is 0.5 but max_grad_norm is 1.0"),
        ({"bf16": {"enabled": True}}, 1, "bf16.enabled is True but bf16 is False"),
        ({"optimizer": {"params": {"lr": 1e-3}}}, 1, "optimizer.params.lr is 0.001 but learning_rate is 0.01"),
    ],
)
def test_numbers_that_differ(tmp_path: Path, changes: dict[str, Any], world: int, said: str) -> None:
    arguments = numbers(tmp_path)
    with pytest.raises(ConfigError) as caught:
        engine.check_engine(arguments, settings(**changes), world)
    assert said in str(caught.value)
    assert 'write "auto" in the JSON' in str(caught.value)


def test_numbers_that_agree(tmp_path: Path) -> None:
    same = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    engine.check_engine(numbers(tmp_path), settings(**same, bf16={"enabled": False}), 2)
    engine.check_engine(numbers(tmp_path), engine.resolve_deepspeed("zero3"), 7)
    engine.check_engine(numbers(tmp_path), None, 7)


def numbers(folder: Path) -> TrainingArguments:
    """Four rows, accumulated twice."""
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return TrainingArguments(str(folder), use_cpu=True, learning_rate=1e-2, **sizes)


# ------------------------------------------------------------------------------------------------------- the arguments


def read(folder: Path, *flags: str, **more: Any) -> Arguments:
    """Arguments of a run, from a YAML file and flags."""
    values = {"recipe": "lora", "domains": {"a": "a.jsonl"}, "output_dir": str(folder), **more}
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    try:
        return read_arguments(folder / "run.yaml", flags)
    finally:
        unset_hf_deepspeed_config()


def test_deepspeed_by_name_in_the_file_and_on_the_command_line(tmp_path: Path) -> None:
    assert read(tmp_path).training.deepspeed is None
    for found in (read(tmp_path, "--deepspeed", "zero2"), read(tmp_path, deepspeed="zero2")):
        filled = found.training.hf_deepspeed_config.config
        assert filled["zero_optimization"]["stage"] == 2
        assert filled["train_batch_size"] == filled["train_micro_batch_size_per_gpu"] == 8
        assert filled["gradient_clipping"] == 1.0
    assert (
        read(tmp_path, "--deepspeed", "zero1", deepspeed="zero2").chosen()["deepspeed"]["zero_optimization"]["stage"]
        == 1
    )
    with pytest.raises(ConfigError, match="train_batch_size is 7 but 8 rows x 1 accumulated x 1 processes are 8"):
        read(tmp_path, deepspeed=settings(train_batch_size=7))


def test_a_global_batch_reaches_deepspeed(tmp_path: Path) -> None:
    found = read(tmp_path, "--deepspeed", "zero2", "--global_batch_size", "32").training
    assert (found.gradient_accumulation_steps, found.hf_deepspeed_config.config["train_batch_size"]) == (4, 32)


def test_zero3_keeps_the_type_of_the_base(tmp_path: Path) -> None:
    for dtype, flags in (("bfloat16", (True, False)), ("float16", (False, True)), ("float32", (False, False))):
        values = engine.prepare_engine({"dtype": dtype, "deepspeed": "zero3"})
        assert (values.get("bf16", False), values.get("fp16", False)) == flags
        assert engine.prepare_engine({"dtype": dtype, "deepspeed": "zero2"}).keys() == {"dtype", "deepspeed"}
    assert read(tmp_path, "--deepspeed", "zero3").training.bf16  # dtype is bfloat16 by default
    with pytest.raises(ConfigError, match="bf16: got false, but ZeRO-3 loads the base in the type"):
        engine.prepare_engine({"dtype": "bfloat16", "bf16": "false", "deepspeed": "zero3"})


# ------------------------------------------------------------------------------------------------------------ the line


def test_the_line_is_read_off_the_model_that_trains(tmp_path: Path) -> None:
    class Engine(nn.Linear):
        """What DeepSpeed's engine answers when its settings differ from the arguments."""

        def zero_optimization_stage(self) -> int:
            return 3

        def train_micro_batch_size_per_gpu(self) -> int:
            return 5

        def gradient_accumulation_steps(self) -> int:
            return 6

    plain = nn.Linear(2, 2)
    plain.weight.requires_grad_(False).data = plain.weight.data.bfloat16()
    arguments = numbers(tmp_path)
    assert describe_engine(plain, arguments) == (
        "engine: PyTorch, 1 process; 4 rows x 2 accumulated x 1 process = 8 rows a step; trained in float32"
    )
    assert describe_engine(Engine(2, 2), arguments).startswith(
        "engine: DeepSpeed ZeRO-3, 1 process; 5 rows x 6 accumulated x 1 process = 30 rows a step"
    )
