"""Start a program in several processes, with a time limit; it is judged by the files that it leaves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.places import ROOT

LIMIT = 600  # seconds
MARKS = ("ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def program(module: str, *arguments: str | Path, processes: int = 2) -> str:
    """Run ``module``, by torchrun unless ``processes`` is 0, and return what it printed."""
    environment = {k: v for k, v in os.environ.items() if k not in MARKS}
    environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    # Port 0: the launcher's store takes a free one.
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    command = [sys.executable, *(torchrun if processes else []), "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    return done.stdout + done.stderr
