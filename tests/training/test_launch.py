"""Launch scripts: what they say, what they refuse, and the command that each comes down to."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launched import SCRIPTS, launch

NAMES = [script.name for script in SCRIPTS]
OWN = {"NUM_GPUS", "MASTER_PORT", "MASTER_ADDR", "NO_SSH", "NODE_RANK", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}


def test_there_is_a_script_for_each_way() -> None:
    assert NAMES == ["accelerate.sh", "deepspeed.sh", "multinode.sh", "single_gpu.sh", "slurm.sh", "torchrun.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_help_names_every_variable_that_is_read(script: Path) -> None:
    done = launch(script.name, "--help", seconds=30)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{script.name} " in done.stdout
    assert "Example:" in done.stdout
    text = script.read_text()
    read = {name for name in OWN if re.search(rf"\$\{{{name}[:}}-]", text)} | {"NUM_GPUS"} & {
        *re.findall("NUM_GPUS", text)
    }
    assert read
    assert [name for name in read if name not in done.stdout] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_a_missing_or_wrong_file_is_one_line(script: Path, tmp_path: Path) -> None:
    without = launch(script.name, seconds=30)
    assert without.returncode == 2
    assert without.stdout == ""
    assert without.stderr.startswith("Usage: ")
    (tmp_path / "hosts").write_text("worker-1 slots=8\n")
    before = [str(tmp_path / "hosts")] if script.name == "multinode.sh" else []
    wrong = launch(script.name, *before, "none.yaml", seconds=30)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"{script.name}: none.yaml does not exist; ")
    assert wrong.stderr.count("\n") == 1


def test_shellcheck_finds_nothing() -> None:
    tool = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run(
        [tool, "--external-sources", *SCRIPTS, SCRIPTS[0].with_name("common.sh")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")


# ---------------------------------------------------------------------------------------------- what each comes down to


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    """Stand-ins for the launchers: each prints its name and arguments, one a line, and does nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("deepspeed", "torchrun", "accelerate", "srun", "pdsh", "python"):
        (folder / name).write_text('#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@"\n')
        (folder / name).chmod(0o755)
    (folder / "scontrol").write_text('#!/bin/sh\n[ "$*" = "show hostnames node[7-8]" ] && printf "node7\\nnode8\\n"\n')
    (folder / "scontrol").chmod(0o755)
    (tmp_path / "run.yaml").write_text("recipe: lora\n")
    (tmp_path / "hosts").write_text("# two machines\nworker-1 slots=8\nworker-2 slots=8\n")
    return tmp_path


JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_GPUS_ON_NODE": "8",
}
ACCELERATE = "--num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
# The command deepspeed names its interpreter in its first line, which holds no path with a space.
RUNNER = "python -m deepspeed.launcher.runner"
TRAIN = "-m molora.cli train --config {at}/run.yaml"
MODULE = "--module molora.cli train --config {at}/run.yaml"


@pytest.mark.parametrize(
    ("script", "variables", "command"),
    [
        ("single_gpu.sh", {}, f"python {TRAIN}"),
        ("torchrun.sh", {"NUM_GPUS": "4"}, f"torchrun --standalone --nproc_per_node 4 {TRAIN}"),
        (
            "deepspeed.sh",
            {"NUM_GPUS": "4", "MASTER_PORT": "7"},
            f"{RUNNER} --num_gpus 4 --master_port 7 --no_local_rank {MODULE} --deepspeed zero2",
        ),
        (
            "accelerate.sh",
            {"NUM_GPUS": "4"},
            f"accelerate launch --multi_gpu --num_processes 4 {ACCELERATE} {TRAIN}",
        ),
        (
            "accelerate.sh",
            {"NUM_GPUS": "1"},
            f"accelerate launch --num_processes 1 {ACCELERATE} {TRAIN}",
        ),
        (
            "multinode.sh",
            {},
            f"{RUNNER} --hostfile {{at}}/hosts --master_port 29500 --no_local_rank {MODULE} --deepspeed zero2",
        ),
        (
            "multinode.sh",
            {"NO_SSH": "1", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"},
            f"{RUNNER} --hostfile {{at}}/hosts --master_port 29500 --no_local_rank --master_addr 10.0.0.1 --no_ssh "
            f"--node_rank 1 {MODULE} --deepspeed zero2",
        ),
        (
            "slurm.sh",
            JOB,
            "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc_per_node 8 --rdzv_id 123456 --rdzv_backend c10d "
            f"--rdzv_endpoint node7:23456 {TRAIN}",
        ),
    ],
)
def test_the_command(shown: Path, script: str, variables: dict[str, str], command: str) -> None:
    files = [str(shown / name) for name in (("hosts", "run.yaml") if script == "multinode.sh" else ("run.yaml",))]
    done = launch(script, *files, "--seed", "a b", path=(shown / "bin",), seconds=30, **variables)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [*command.format(at=shown).split(), "--seed", "a b"]


@pytest.mark.parametrize("script", ["deepspeed.sh", "multinode.sh"])
def test_deepspeed_is_zero2_unless_something_else_is_named(shown: Path, script: str) -> None:
    def zero(*flags: str) -> list[str]:
        files = [str(shown / "hosts")] if script == "multinode.sh" else []
        done = launch(script, *files, str(shown / "run.yaml"), *flags, path=(shown / "bin",), seconds=30, NUM_GPUS="2")
        return [a for a in done.stdout.splitlines() if "zero" in a and "/" not in a]

    assert zero() == ["zero2"]
    assert zero("--deepspeed", "zero3") == ["zero3"]
    assert zero("--deepspeed=zero1") == ["--deepspeed=zero1"]
    (shown / "run.yaml").write_text("recipe: lora\ndeepspeed: zero3\n")
    assert zero() == []


@pytest.mark.parametrize(
    ("script", "variables", "hosts", "said"),
    [
        ("multinode.sh", {"NO_SSH": "1"}, "a slots=1\n", "NO_SSH needs NODE_RANK and MASTER_ADDR"),
        ("multinode.sh", {}, "a 8\n", "expected lines like 'worker-1 slots=8'"),
        ("multinode.sh", {}, "", "expected lines like 'worker-1 slots=8'"),
        ("slurm.sh", {}, "", "this is no SLURM job: start it with sbatch"),
        ("slurm.sh", {**JOB, "SLURM_GPUS_ON_NODE": ""}, "", "the job has no GPUs: give sbatch --gpus-per-node"),
    ],
)
def test_what_cannot_start_is_one_line(
    shown: Path, script: str, variables: dict[str, str], hosts: str, said: str
) -> None:
    (shown / "hosts").write_text(hosts)
    files = [str(shown / "hosts")] if script == "multinode.sh" else []
    done = launch(script, *files, str(shown / "run.yaml"), path=(shown / "bin",), seconds=30, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh", "accelerate.sh", "multinode.sh"])
def test_a_launcher_that_is_not_installed(shown: Path, tmp_path: Path, script: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "env", "grep", "basename", "cat", "dirname"):
        (tools / name).symlink_to(str(shutil.which(name)))
    files = [str(shown / name) for name in (("hosts", "run.yaml") if script == "multinode.sh" else ("run.yaml",))]
    done = launch(script, *files, seconds=30, PATH=str(tools))
    assert done.returncode == 2
    assert "is not on PATH" in done.stderr
    assert "environment" in done.stderr
