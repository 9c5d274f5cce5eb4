"""Training of linears with several banks under ZeRO-2 and 3, as a program for two processes.

Started by ``torchrun -m tests.support.several_banks FOLDER``; test_several_banks_uses.py compares with one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import distributed

import molora
from molora.config import AlwaysOn
from tests.support import several, tiny
from tests.support.training_runs import trainer

STAGES = (2, 3)


def model() -> Any:
    """A mixture with a plain bank and one of frozen ranks that are always on."""
    always = (AlwaysOn(name="shared", r=3), AlwaysOn(name="error", r=2, bank="frozen_ranks"))
    made = molora.RECIPES["mola"](r=4, num_experts=3)
    config = made.replace(placements=tuple(p.replace(always=always) for p in made.placements))
    return tiny.arm(molora.convert(tiny.base_model("llama"), config))


def train(folder: Path, rows: int, stage: int = 0) -> dict[str, Any]:
    """Three steps over eight rows in all, ``rows`` on each process; what was trained, gathered."""
    mixture = model()
    own = {"deepspeed": several.deepspeed_config(stage)} if stage else {}
    it = trainer(mixture, folder, **{**several.ARGUMENTS, **own, "per_device_train_batch_size": rows})
    it.train_dataset = several.rows_of("mixed", mixture)
    it.train()
    return {"state": several.whole_state(it)}


def main(folder: Path) -> None:
    """ZeRO on two processes; the first leaves the results."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(1)
    for stage in STAGES:
        AcceleratorState._reset_state(reset_partial_state=True)
        result = train(folder / f"run{stage}", 4, stage)
        if int(os.environ["RANK"]) == 0:
            torch.save(result, folder / f"zero{stage}.pt")
    distributed.barrier()
    os._exit(0)  # the backends' teardown aborts once in a while, when all is done


if __name__ == "__main__":
    main(Path(sys.argv[1]))
