"""Peak memory of one subject in a process of its own: ``python -m benchmarks.memory NAME`` prints a JSON line."""

from __future__ import annotations

import json
import subprocess
import sys

from benchmarks.timing import ROOT

LIMIT_S = 300  # for one subject, imports and loading included


def peak_mib(subject: str) -> float:
    """Peak resident set of a fresh process that builds ``subject`` and runs it (a training step twice), in MiB."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", subject],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=True,
    )
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


if __name__ == "__main__":
    from benchmarks.subjects import SUBJECTS
    from molora.eval.scoring.fresh_process import peak_gb

    run = SUBJECTS[sys.argv[1]]()
    for _ in range(2 if "step" in sys.argv[1] else 1):  # the optimizer's state is there from the second on
        run()
    print(json.dumps({"peak_mib": peak_gb() * 1024}))
