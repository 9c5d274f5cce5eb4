"""The shipped small run of a real language model under DeepSpeed on two processes: as one process, and after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from molora.training import find_newest
from tests.support.launched import ROOT, environment, free_port
from tests.support.tolerances import close

pytestmark = pytest.mark.dist
CONFIG = ROOT / "training" / "configs" / "smollm2_mixlora.yaml"
STEPS, LIMIT = 6, 280
# Fewer rows, in an order that does not depend on how many processes take them; float32, to compare what they reach.
SHORT = (
    f"--max_steps {STEPS} --train_examples 24 --train_sampling_strategy sequential --dtype float32 --logging_steps 1 "
    "--save_steps 100 --lr_scheduler_type constant --warmup_steps 0"
).split()


def start(name: str, out: Path, rows: int, *flags: str) -> subprocess.Popen[str]:
    """A launch script with the short run, in a process group of its own, as a shell starts it."""
    command = [str(ROOT / "training" / "launch" / name), str(CONFIG), *SHORT, "--output_dir", str(out)]
    command += ["--per_device_train_batch_size", str(rows), *flags]
    variables = environment(NUM_GPUS="2", MASTER_PORT=str(free_port()))
    with open(out.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def finish(running: subprocess.Popen[str]) -> int:
    """Its exit code; a run that hangs is killed, with all that it started, and is a failure."""
    try:
        return running.wait(LIMIT)
    finally:
        if running.poll() is None:
            os.killpg(running.pid, signal.SIGKILL)


def alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def losses(out: Path) -> dict[int, float]:
    log = json.loads((out / "train_log.json").read_text())
    return {entry["step"]: entry["loss"] for entry in log if "loss" in entry}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One process; then two under ZeRO-2, whole; then two that get a Ctrl-C after some steps, and go on."""
    folder = tmp_path_factory.mktemp("smollm2")
    places = {name: folder / name for name in ("one", "two", "cut")}
    assert finish(start("single_gpu.sh", places["one"], 4)) == 0, (folder / "one.log").read_text()[-3000:]
    finish(start("deepspeed.sh", places["two"], 2, "--deepspeed", "zero2"))
    running = start("deepspeed.sh", places["cut"], 2, "--deepspeed", "zero2")
    log, end = folder / "cut.log", time.monotonic() + LIMIT
    while f"| 2/{STEPS}" not in log.read_text() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)  # as the terminal does: to the launcher and all that it started
    (folder / "code").write_text(str(finish(running)))
    while alive(running.pid) and time.monotonic() < end:  # DeepSpeed's launcher leaves at once, its processes finish
        time.sleep(0.1)
    (folder / "stopped").write_text(str(find_newest(places["cut"])))
    finish(start("deepspeed.sh", places["cut"], 2, "--deepspeed", "zero2", "--resume_from_checkpoint", "true"))
    return places


def test_two_processes_under_zero2_reach_the_loss_of_one(runs: dict[str, Path]) -> None:
    printed = runs["two"].with_suffix(".log").read_text()
    assert (runs["two"] / "train_log.json").exists(), printed[-3000:]
    assert "engine: DeepSpeed ZeRO-2, 2 processes; 2 rows x 1 accumulated x 2 processes = 4 rows a step" in printed
    assert f"{STEPS}/{STEPS}" in printed  # the progress bar's end
    one, two = losses(runs["one"]), losses(runs["two"])
    assert one.keys() == two.keys() == set(range(1, STEPS + 1))
    close(torch.tensor(list(two.values())), torch.tensor(list(one.values())), "real_model_fp32")
    assert min(one.values()) < one[1]


def test_ctrl_c_leaves_a_whole_checkpoint_and_the_run_goes_on(runs: dict[str, Path]) -> None:
    printed = runs["cut"].with_suffix(".log").read_text()
    stopped = Path((runs["cut"].parent / "stopped").read_text())
    assert stopped.name.startswith("checkpoint-"), printed[-3000:]
    step = int(stopped.name.rpartition("-")[2])
    assert 2 <= step < STEPS
    assert "finishing this step and saving a checkpoint" in printed
    assert "go on with the same command and --resume_from_checkpoint true" in printed
    assert int((runs["cut"].parent / "code").read_text()) != 0
    whole, resumed = losses(runs["two"]), losses(runs["cut"])
    assert resumed.keys() == whole.keys(), printed[-3000:]
    assert resumed == whole
