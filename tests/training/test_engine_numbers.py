"""Batch sizes for the processes at hand, numbers that DeepSpeed's settings repeat, the line that says who trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn
from transformers import TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from molora.errors import ConfigError
from molora.training.arguments import Arguments, read_arguments
from molora.training.engine import settings as engine
from molora.training.engine.line import describe_engine
from tests.support.launched import no_engine


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here starts an engine."""
    no_engine(monkeypatch)


def settings(**more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}, **more}


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


def test_what_the_deepspeed_launcher_appends_is_understood(tmp_path: Path) -> None:
    assert read(tmp_path, "--local_rank=1").training.local_rank == 1


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
