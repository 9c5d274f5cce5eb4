"""Training that is cut in two, as a program: ``begin`` trains six steps, and three; ``go on`` does the other three.

Started once for each half, alone or by torchrun, so that the second half runs in new processes. ``alone`` goes on in
one process with what two have left, by DeepSpeed's universal format.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed

from tests.support import tiny
from tests.support.several import deepspeed_config, whole_state
from tests.support.training_runs import build, logged, run

STEPS, CUT = 6, 3
ENGINES = ("ddp", "zero2", "zero3")
UNIVERSAL = (("zero2", "mixlora"), ("zero3", "mixlora"))


def options(engine: str, recipe: str) -> dict[str, Any]:
    """Dropout, so that the random state counts; not where another number of processes goes on, with other masks."""
    return {} if (engine, recipe) in UNIVERSAL else {"lora_dropout": 0.1}


def cases(alone: bool) -> list[tuple[str, str]]:
    """(engine, recipe): every recipe in one process; a routed one with a loss, and one with a bias, in several."""
    return [("", r) for r in tiny.RECIPES] if alone else [(e, r) for e in ENGINES for r in ("mixlora", "smora")]


def arguments(engine: str, **more: Any) -> dict[str, Any]:
    """Six steps in three epochs; the cut is in the middle of the second."""
    sizes = {"max_steps": STEPS, "per_device_train_batch_size": 2 if engine else 4, "lr_scheduler_type": "cosine"}
    config = {"deepspeed": deepspeed_config(int(engine[-1]))} if engine.startswith("zero") else {}
    return {**sizes, **config, **more}


class CutError(Exception):
    """The power went."""


def stop_after(step: int) -> Any:
    """A callback that ends the process's training without a word to it."""
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise CutError

    return Stop()


def begin(engine: str, recipe: str, folder: Path) -> dict[str, Any]:
    """The run without interruption, and the first half of the other."""
    from tests.support.training_runs import trainer

    whole = run(build(recipe, **options(engine, recipe)), folder / "whole", **arguments(engine))
    result = {"loss": logged(whole, "loss"), "state": whole_state(whole)}
    reset()
    half = trainer(
        build(recipe, **options(engine, recipe)),
        folder / "cut",
        **arguments(engine, save_strategy="steps", save_steps=CUT),
    )
    half.add_callback(stop_after(CUT))
    try:
        half.train()
    except CutError:
        return {**result, "half": whole_state(half)}
    raise AssertionError("it was not cut")


def go_on(engine: str, recipe: str, folder: Path) -> dict[str, Any]:
    """The second half, from the newest checkpoint."""
    torch.manual_seed(12345)  # whatever random state this process has, the checkpoint's counts
    it = run(build(recipe, **options(engine, recipe)), folder / "cut", resume=True, **arguments(engine))
    return {"loss": logged(it, "loss"), "state": whole_state(it)}


def go_on_alone(engine: str, recipe: str, folder: Path) -> dict[str, Any]:
    """One process goes on with what two have left, converted as DeepSpeed's own tool does it."""
    left = folder / "cut" / f"checkpoint-{CUT}"
    tool = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
    names = ["--input_folder", left / f"global_step{CUT}", "--output_folder", left / f"global_step{CUT}_universal"]
    subprocess.run([*tool, "--num_merge_workers", "1", *map(str, names)], check=True, timeout=120, capture_output=True)
    universal = deepspeed_config(int(engine[-1])) | {"checkpoint": {"load_universal": True}}
    it = run(build(recipe), folder / "cut", resume=True, **arguments("", deepspeed=universal))
    return {"loss": logged(it, "loss"), "state": whole_state(it), "processes": distributed.get_world_size()}


def reset() -> None:
    """accelerate keeps one state a process; every run here has its own."""
    AcceleratorState._reset_state(reset_partial_state=True)


HALVES = {"begin": begin, "go on": go_on, "alone": go_on_alone}


def main(half: str, folder: Path) -> None:
    """All cases of one half."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    alone = "RANK" not in os.environ
    for engine, recipe in UNIVERSAL if half == "alone" else cases(alone):
        reset()
        place = folder / f"{engine or 'alone'}-{recipe}"
        try:
            result = HALVES[half](engine, recipe, place)
        except Exception:
            result = {"error": traceback.format_exc()}
        if alone or os.environ["RANK"] == "0":
            torch.save(result, folder / f"{place.name}-{half}.pt")
            print(json.dumps({"done": place.name, "error": result.get("error", "")[-300:]}), flush=True)
    if not alone:
        distributed.barrier()
        os._exit(0)  # the backends' teardown aborts once in a while, when all is done


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
