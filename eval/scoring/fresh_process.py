"""Answer prompts in a process of its own, with nothing but what is on disk.

``python -m molora.eval.scoring.fresh_process`` reads a job from stdin and writes the answers to stdout, both JSON:
``{"base": folder, "dtype": "bfloat16", "adapter": folder, "prompts": {name: text}, "max_new_tokens": 32}`` and
``{"texts": {name: answer}, "peak_gb": 1.5}``.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from molora.errors import CheckpointError
from molora.eval.scoring.losses import answer
from molora.load import load

__all__ = ["Answers", "fresh_answers", "peak_gb"]

TIME_LIMIT = 300  # seconds, for start, loading and answers together


class Answers(NamedTuple):
    """The answer to each prompt by name, and the peak memory of the process that gave them, in GiB."""

    texts: dict[str, str]
    peak_gb: float


def fresh_answers(base: Path, dtype: str, adapter: Path, prompts: Mapping[str, str], max_new_tokens: int) -> Answers:
    """Start a Python process that loads base and adapter and answers each prompt.

    Raises:
        CheckpointError: the process failed, with the end of what it said, or took too long.
    """
    job = {"base": os.fspath(base), "dtype": dtype, "adapter": os.fspath(adapter), "prompts": dict(prompts)}
    checkout = os.fspath(Path(__file__).absolute().parents[3])
    paths = os.pathsep.join(p for p in (checkout, os.environ.get("PYTHONPATH", "")) if p)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "molora.eval.scoring.fresh_process"],
            input=json.dumps({**job, "max_new_tokens": max_new_tokens}),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=TIME_LIMIT,
            check=False,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"},
        )
    except subprocess.TimeoutExpired as e:
        raise CheckpointError(f"{adapter}: a fresh process did not answer within {TIME_LIMIT} s") from e
    if done.returncode:
        raise CheckpointError(f"{adapter}: loading in a fresh process failed:\n{done.stderr.strip()[-2000:]}")
    return Answers(**json.loads(done.stdout.splitlines()[-1]))


def peak_gb(now: bool = False) -> float:
    """Peak resident memory of this process in GiB; with ``now``, what is resident at this moment where that is known.

    The kernel's own count where there is one: ``getrusage`` of a child starts at the peak of the parent it was forked
    from, whatever the child then runs.
    """
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="ascii", errors="replace").splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmRSS:" if now else "VmHWM:"):
            return int(line.split()[1]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _answer(job: Mapping[str, Any]) -> dict[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    return answer(load(base, job["adapter"]), tokenizer, job["prompts"], job["max_new_tokens"])


if __name__ == "__main__":
    texts = _answer(json.load(sys.stdin))
    sys.stdout.write(json.dumps(Answers(texts, peak_gb())._asdict()) + "\n")
