"""``molora train --dry-run``: what it needs, what it says of files that are not here, and what the documents quote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf
import yaml

import molora
from molora.errors import ConfigError
from molora.training import job
from molora.training.arguments import read_arguments
from molora.training.plan.dry_run import dry_run
from molora.training.plan.overview import Batch, plan
from molora.training.plan.shapes import base_without_storage
from molora.training.plan.table import GIB
from tests.cli.test_cli import molora as command
from tests.support import tiny_text
from tests.support.places import ROOT
from tests.support.tiny import base_model, write_adapter

CONFIGS = ROOT / "training" / "configs"


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A run on a tiny model and domain files that are here."""
    return {
        "model_name_or_path": str(tiny_text.model_folder(tmp_path / "model")),
        "dtype": "float32",
        "recipe": "mola",
        "options": {"num_experts": 2, "r": 2},
        "domains": tiny_text.domains(tmp_path),
        "max_length": 48,
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
    }


def written(values: dict[str, Any], path: Path, **changes: Any) -> Path:
    (path / "run.yaml").write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path / "run.yaml"


def test_rows_and_steps_are_those_of_the_run(values: dict[str, Any], tmp_path: Path) -> None:
    arguments = read_arguments(written(values, tmp_path, num_train_epochs=1, disable_tqdm=True, save_strategy="no"))
    plan = dry_run(arguments).plan
    trained = job.run(arguments)
    assert plan.rows == len(trained.data.train)
    assert plan.steps == trained.log[-1]["step"]
    trainable, total = trained.model.get_nb_trainable_parameters()  # type: ignore[operator]
    assert sum(k.trained for k in plan.kinds) == trainable
    assert sum(k.parameters for k in plan.kinds) == total


def test_neither_weights_nor_data_have_to_be_there(values: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "model/model.safetensors").unlink()
    run = written(values, tmp_path, domains={"law": "nowhere/law.jsonl"})
    found = dry_run(read_arguments(run))
    assert (found.plan.rows, found.plan.steps) == (None, None)
    assert "missing: domains.law = nowhere/law.jsonl; a training run needs them" in found.notes
    assert dry_run(read_arguments(run, ["--assumed_rows", "160"]), 2).plan.steps == 3 * 5
    assert dry_run(read_arguments(run, ["--train_examples", "64"])).plan.rows == 64


def test_data_that_are_there_are_checked(values: dict[str, Any], tmp_path: Path) -> None:
    bad = tiny_text.jsonl(tmp_path / "bad.jsonl", [{"txt": "no such field"}])
    with pytest.raises(ConfigError, match=r"bad\.jsonl"):
        dry_run(read_arguments(written(values, tmp_path, domains={"bad": str(bad)})))
    with pytest.raises(ConfigError, match="builtin:codee"):
        dry_run(read_arguments(written(values, tmp_path, domains={"bad": "builtin:codee"})))


def test_an_unknown_base_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    run = written(values, tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'meta-llama/Llama-2-7b-hf'") as caught:
        dry_run(read_arguments(run, ["--model_name_or_path", "meta-llama/Llama-2-7b"]))
    assert "config.json" in str(caught.value)
    with pytest.raises(ConfigError, match="dtype: got 'int4'"):
        dry_run(read_arguments(run, ["--dtype", "int4"]))
    with pytest.raises(ConfigError, match="gpus: got 0"):
        dry_run(read_arguments(run), 0)


def test_a_base_that_is_no_language_model_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    tf.ViTConfig(hidden_size=32, num_hidden_layers=1).save_pretrained(tmp_path / "vit")
    with pytest.raises(ConfigError, match="is a 'vit', expected a causal or a vision-language model"):
        dry_run(read_arguments(written(values, tmp_path), ["--model_name_or_path", str(tmp_path / "vit")]))


def test_assumed_adapters_plan_as_the_real_ones_do(values: dict[str, Any], tmp_path: Path) -> None:
    base_model("llama").config.save_pretrained(tmp_path / "base")
    folders = {name: tmp_path / "loras" / name for name in ("math", "code")}
    run = written(
        values,
        tmp_path,
        model_name_or_path=str(tmp_path / "base"),
        recipe="meteora",
        options={"adapters": {k: str(v) for k, v in folders.items()}},
        train_examples=64,
    )
    with pytest.raises(ConfigError, match="2 folders do not exist, the first is math") as caught:
        dry_run(read_arguments(run))
    assert "assumed_adapters" in str(caught.value)
    assumed = read_arguments(run, ["--assumed_adapters", "{r: 4, target_modules: [q_proj, v_proj]}"])
    without = dry_run(assumed)
    assert any("2 of 2 are not here" in note for note in without.notes)
    for seed, folder in enumerate(folders.values()):
        write_adapter(folder, "llama", r=4, seed=seed, only=("q_proj", "v_proj"))
    with_them = dry_run(assumed)
    assert with_them.plan == without.plan
    assert not any("adapters" in note for note in with_them.notes)


# ------------------------------------------------------------------------------------- the command line, the documents


def test_the_command_prints_the_plan_and_trains_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", lambda *a, **k: pytest.fail("weights were loaded"))
    small = [
        "train",
        "--config",
        str(CONFIGS / "smollm2_mixlora.yaml"),
        "--dry-run",
        "--output_dir",
        str(tmp_path / "o"),
    ]
    code, out, _ = command(capsys, monkeypatch, *small, "--gpus", "4")
    assert code == 0
    said = ("134,515,008", "gate_proj, up_proj", "4 a GPU x 1 accumulated x 4 GPUs = 16", "3, offload", "240")
    assert [s for s in said if s not in out] == []
    assert not (tmp_path / "o").exists()
    assert "4 a GPU x 1 accumulated x 1 GPUs = 4" in command(capsys, monkeypatch, *small)[1]
    code, _, err = command(capsys, monkeypatch, *[a for a in small if a != "--dry-run"], "--gpus", "4")
    assert (code, "--gpus: got a number without --dry-run" in err) == (2, True)


def test_what_the_readme_shows_is_what_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    shown = (ROOT / "README.md").read_text().split("$ molora train ")[1].split("```")[0].splitlines()
    _, out, _ = command(capsys, monkeypatch, "train", *shown[0].split())
    printed = [line.rstrip() for line in out.splitlines()]
    assert len(shown) > 8
    assert [line for line in shown[1:] if line not in printed and line != "..."] == []


TABLE = {"8B": "meta-llama/Meta-Llama-3-8B", "70B": "meta-llama/Meta-Llama-3-70B"}


@pytest.fixture(scope="module")
def large() -> dict[str, Any]:
    """The two bases of ARCHITECTURE.md's table, converted as the shipped config for a cluster does it."""
    arguments = read_arguments(CONFIGS / "mixlora_llama3_8b.yaml")
    found = {}
    for size, name in TABLE.items():
        arguments.model.model_name_or_path = name
        found[size] = molora.convert(base_without_storage(arguments.model), job.recipe_config(arguments.mixture))
    return found


@pytest.mark.parametrize("gpus", [8, 64, 512])
@pytest.mark.parametrize("size", TABLE)
def test_the_table_past_this_machine_is_computed_by_the_plan(size: str, gpus: int, large: dict[str, Any]) -> None:
    found = plan(large[size], Batch(micro=4, accumulation=1, gpus=gpus, length=2048), checkpointing=True)
    sent = dict(found.traffic)
    numbers = [m.gpu for m in found.memory] + [sent["ZeRO-1"], sent["ZeRO-3"], found.expert_parallel]
    row = " | ".join((size, str(gpus), *(f"{n / GIB:,.1f}" for n in numbers)))
    assert f"| {row} |" in (ROOT / "ARCHITECTURE.md").read_text()
