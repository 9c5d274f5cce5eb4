"""All things that files outside add, in one recipe: the command line, ZeRO-2 and ZeRO-3, by a driver of three lines."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import molora
from molora.training.engine.settings import resolve_deepspeed
from tests.support import tiny_text
from tests.support.added_things import FILES, added
from tests.support.behaviours import assert_same
from tests.support.launched import environment
from tests.support.tolerances import close

pytestmark = pytest.mark.dist
LIMIT = 240  # seconds
DRIVER = f"""import {", ".join(path.stem for path in FILES)}
from molora.cli.main import main
main()
"""
TWO = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
TWO += ["--rdzv_endpoint", "localhost:0"]
WAYS = {
    "alone": ([], ["--per_device_train_batch_size", "4"]),
    "zero2": (TWO, ["--per_device_train_batch_size", "2", "--deepspeed", "zero2"]),
    "zero3": (TWO, ["--per_device_train_batch_size", "2", "--deepspeed", "cut.json"]),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, a driver, a tiny base, rows in a format of its own, and the arguments of a run; then the runs."""
    folder = tmp_path_factory.mktemp("added")
    for path in FILES:
        shutil.copy(path, folder)
    (folder / "driver.py").write_text(DRIVER)
    domains = {}
    for i, name in enumerate(("sums", "letters")):
        rows = [{"question": f"{name} {n}?", "answer": "abcdefgh"[n % 8] if i else str(n + 1)} for n in range(24)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        domains[name] = f"{name}.jsonl"
    values = {
        "model_name_or_path": str(tiny_text.model_folder(folder / "model")),
        "dtype": "float32",
        "recipe": "whole",
        "options": {"sharpness": 3.0},
        "domains": domains,
        "task_of_domain": {"sums": "0", "letters": "2"},
        "max_length": 48,
        "global_batch_size": 4,
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 0.02,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_steps": 3,
        "use_cpu": True,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    cut = resolve_deepspeed("zero3") or {}
    cut["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # these experts are so small that none is cut
    (folder / "cut.json").write_text(json.dumps(cut))
    for way, (launcher, flags) in WAYS.items():
        drive(folder, *launcher, "driver.py", "train", "--config", "run.yaml", "--output_dir", way, *flags, log=way)
    return folder


def drive(folder: Path, *command: str, log: str) -> str:
    """Run the driver there, with a time limit; what it printed is kept beside it."""
    env = environment(DS_ACCELERATOR="cpu")
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    (folder / f"{log}.log").write_text(done.stdout + done.stderr)
    return done.stdout


def losses(workplace: Path, way: str) -> torch.Tensor:
    path = workplace / way / "train_log.json"
    assert path.exists(), (workplace / f"{way}.log").read_text()[-3000:]
    return torch.tensor([entry["loss"] for entry in json.loads(path.read_text()) if "loss" in entry])


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_two_processes_are_one(workplace: Path, way: str) -> None:
    """Losses, with the rule's and the penalty's part, and what is saved."""
    one, two = losses(workplace, "alone"), losses(workplace, way)
    assert len(one) == 3
    close(two, one, "logged")
    with added_here(workplace):
        states = [molora.load(base(workplace), workplace / name).state_dict() for name in ("alone", way)]
    for name, t in states[0].items():
        close(states[1][name], t, "additive")


def test_a_reload_is_what_was_trained_and_every_thing_learned(workplace: Path) -> None:
    losses(workplace, "alone")
    with added_here(workplace):
        loaded = molora.load(base(workplace), workplace / "alone", trainable=True)
        placement = loaded._molora.config.placements[0]
        assert (placement.router.kind, placement.gate.kind) == ("cosine", "threshold")
        assert placement.router.sharpness == 3.0
        fresh = dict(molora.convert(base(workplace), loaded._molora.config, seed=42).named_parameters())
        trained = {n: p for n, p in loaded.named_parameters() if p.requires_grad}
        moved = {n.rpartition(".")[2] for n, p in trained.items() if not torch.equal(p, fresh[n])}
        assert moved == {"lora_A", "lora_B", "weight", "offset", "sharpness", "more", "diagonal"}
        again = workplace / "again"
        loaded.save_pretrained(again)
        assert_same(dict(molora.load(base(workplace), again).state_dict()), dict(loaded.state_dict()))


def test_the_command_line_knows_them(workplace: Path) -> None:
    shown = drive(workplace, "driver.py", "info", "whole", log="info")
    assert "sharpness" in shown, (workplace / "info.log").read_text()[-2000:]
    shown = drive(workplace, "driver.py", "info", "--parts", log="parts")
    own = ("cosine", "threshold", "slope=2.0", "task_margin", "sparse", "diagonal", "banded", "questions", "its own")
    assert [name for name in own if name not in shown] == []
    wrong = ["--options.sharpnes", "2", *WAYS["alone"][1]]
    drive(workplace, "driver.py", "train", "--config", "run.yaml", *wrong, log="wrong")
    assert "unknown option 'sharpnes'; did you mean 'sharpness'?" in (workplace / "wrong.log").read_text()


def added_here(workplace: Path) -> object:
    (workplace / "copies").mkdir(exist_ok=True)
    return added(workplace / "copies")


def base(workplace: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(workplace / "model")
    return model
