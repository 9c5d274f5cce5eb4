"""The command line: help that teaches, one message and exit code 2 for bad input, training end to end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from molora.cli import main as cli
from molora.recipes import RECIPES
from tests.support import tiny_text
from tests.support.places import ROOT


def molora(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, str]:
    """Run the entry point in this process: exit code, stdout, stderr; as in a terminal of 200 columns."""
    monkeypatch.setattr(sys, "argv", ["molora", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    for console in (cli.output, cli.errors):
        monkeypatch.setattr(console, "_width", 200)
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ([], ["train", "demo", "bench", "info"]),
        (["train"], ["--config", "domains", "heldout_domains", "max_length", "messages", "learning_rate", "zero2"]),
        (["demo"], ["--out", "--check", "runs/demo", "nothing is downloaded"]),
        (["bench"], ["--check", "--quick", "PEFT"]),
        (["info"], ["recipe"]),
    ],
)
def test_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str], said: list[str]
) -> None:
    code, out, _ = molora(capsys, monkeypatch, *command, "--help")
    assert code == 0
    assert [s for s in said if s not in out] == []


def test_info_lists_every_recipe_and_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = molora(capsys, monkeypatch, "info")
    assert code == 0
    assert [name for name in (*RECIPES, "torch", "transformers") if name not in out] == []
    code, out, _ = molora(capsys, monkeypatch, "info", "mola")
    assert code == 0
    assert "(2, 4, 6, 8)" in out
    assert "lora_alpha" in out


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A YAML file for a run of three steps."""
    values = {
        "model_name_or_path": str(tiny_text.model_folder(tmp_path / "model")),
        "dtype": "float32",
        "recipe": "mixlora",
        "options": {"num_experts": 3, "top_k": 2, "r": 2},
        "domains": tiny_text.domains(tmp_path),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "save_strategy": "no",
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train", "--config"),
        ("train --config none.yaml", "none.yaml does not exist"),
        ("train --config {run} --learning_rat 1", "did you mean 'learning_rate'"),
        ("train --config {run} --options.num_expert 1", "did you mean 'num_experts'"),
        ("train --config {run} --recipe lorra", "did you mean 'lora'"),
        ("train --config {run} --domains.sums none.jsonl", "none.jsonl does not exist"),
        ("train --config {run} --domains.sums {run}", "run.yaml:1: not JSON"),
        ("train --config {run} --model_name_or_path nowhere", "model: nowhere does not exist"),
        ("train --config {run} --deepspeed zeroo2", "did you mean 'zero2'"),
        ("train --config {run} --global_batch_size 12", "global_batch_size: got 12, expected a multiple of 8"),
        ("demo --config {run} --config {run}", "expected distinct ones"),
        ("demo --train_example 1", "did you mean 'train_examples'"),
        ("info lorra", "did you mean 'lora'"),
        ("bench qpu", "expected one of cpu"),
        ("trian", "No such command"),
    ],
)
def test_bad_input_ends_in_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_file: Path, arguments: str, said: str
) -> None:
    code, _, err = molora(capsys, monkeypatch, *arguments.format(run=run_file).split())
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not (run_file.parent / "out").exists()


def test_an_error_of_another_process_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "RANK", 3)
    code, _, err = molora(capsys, monkeypatch, "info", "lorra")
    assert code == 2
    assert err.startswith("error in process 3: info: got 'lorra'")


def test_trains_from_the_shell(run_file: Path) -> None:
    command = [sys.executable, "-m", "molora.cli", "train", "--config", str(run_file), "--learning_rate", "1e-2"]
    root = ROOT
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "COLUMNS": "200"},
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3 steps in" in done.stdout
    assert "counting.jsonl" in done.stdout
    assert "100%" in done.stderr  # the Trainer's own progress bar
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(os.listdir(run_file.parent / "out"))


def test_info_says_which_kernel_runs_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = molora(capsys, monkeypatch, "info", "--kernels")
    assert code == 0
    said = ("triton", "sorted", "torch", "64 x 32, 2 chosen", "passes over sorted tokens", "128 x 16 x 128")
    assert [s for s in said if s not in out] == []
