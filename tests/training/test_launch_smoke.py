"""Every launch script trains a tiny model for two steps on CPU processes, and the engine is the one asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import molora
from molora.training.engine.settings import resolve_deepspeed
from tests.support import tiny_text
from tests.support.launched import free_port, launch

pytestmark = pytest.mark.dist

# Stand-ins for SLURM's commands: one machine, this one; srun runs what follows its own options here.
SLURM = {
    "scontrol": '#!/bin/sh\necho "127.0.0.1"\n',
    "srun": '#!/bin/sh\n[ "$1" = "--kill-on-bad-exit=1" ] || exit 9\nshift\nexec "$@"\n',
}
JOB = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "here", "SLURM_GPUS_ON_NODE": "2"}
BY_HAND = {"NO_SSH": "1", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
# Script, variables, flags, the engine that its line must name. Eight rows a step each time.
WAYS = {
    "single": ("single_gpu.sh", {}, ["--deepspeed", "zero3_offload"], "DeepSpeed ZeRO-3, 1 process; 4 rows x 2"),
    "torchrun": ("torchrun.sh", {}, [], "DDP, 2 processes; 4 rows x 1"),
    "deepspeed": ("deepspeed.sh", {}, [], "DeepSpeed ZeRO-2, 2 processes; 4 rows x 1"),
    "accelerate": ("accelerate.sh", {}, ["--deepspeed", "zero1"], "DeepSpeed ZeRO-1, 2 processes; 4 rows x 1"),
    "hostfile": (
        "multinode.sh",
        BY_HAND,
        ["--deepspeed", "{at}/cut.json"],
        "DeepSpeed ZeRO-3, 2 processes; 4 rows x 1",
    ),
    "slurm": ("slurm.sh", JOB, [], "DDP, 2 processes; 4 rows x 1"),
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, its domains, the arguments of a run, a hostfile, a JSON file and SLURM's commands."""
    folder = tmp_path_factory.mktemp("smoke")
    values = {
        "model_name_or_path": str(tiny_text.model_folder(folder / "model")),
        "dtype": "float32",
        "recipe": "mixlora",
        "options": {"num_experts": 4, "top_k": 2, "r": 4},
        "domains": tiny_text.domains(folder),
        "max_length": 48,
        "per_device_train_batch_size": 4,
        "global_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(values))
    (folder / "hosts").write_text("localhost slots=2\n")
    cut = resolve_deepspeed("zero3") or {}
    cut["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # these experts are so small that none is cut
    (folder / "cut.json").write_text(json.dumps(cut))
    for name, text in SLURM.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_a_launch_trains_and_saves(workplace: Path, tmp_path: Path, way: str) -> None:
    script, variables, flags, engine = WAYS[way]
    files = [str(workplace / name) for name in (("hosts", "run.yaml") if way == "hostfile" else ("run.yaml",))]
    out = tmp_path / "out"
    settings = {"NUM_GPUS": "2", "MASTER_PORT": str(free_port()), **variables}
    flags = [flag.format(at=workplace) for flag in flags]
    done = launch(script, *files, *flags, "--output_dir", str(out), path=(workplace,), **settings)

    # Judged by what is there: ending the processes can go wrong when all is done.
    assert f"engine: {engine} accumulated" in done.stdout, done.stdout + done.stderr
    assert "= 8 rows a step; trained in float32" in done.stdout
    assert done.stdout.count("2 steps in") == done.stdout.count("counting.jsonl") == 1  # one process speaks
    assert len(list((out / "checkpoint-2").glob("global_step2"))) == engine.startswith("DeepSpeed")

    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    loaded = molora.load(base, out)
    trained = [p for name, p in loaded.named_parameters() if name.endswith("lora_B")]
    assert trained
    assert all(bool(p.any()) for p in trained)  # B starts at zero
    loss = [entry["loss"] for entry in json.loads((out / "train_log.json").read_text()) if "loss" in entry]
    assert torch.tensor(loss).isfinite().all()
    assert len(loss) == 2
