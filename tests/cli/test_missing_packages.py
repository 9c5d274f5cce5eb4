"""A package of an extra that is not installed: one line that names the extra, no traceback, exit code 2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from molora.errors import ConfigError
from molora.eval.page.figures import load_heatmaps
from tests.support.places import ROOT

# What a user does, without the package; the blocker acts like an environment where it was never installed.
BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Missing(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda n, *a: None if n.partition(".")[0] in {packages!r} else real(n, *a)
"""
COMMAND = "sys.argv = ['molora', *{arguments!r}]\nfrom molora.cli.main import main\nmain()"
TRAIN = ["train", "--config", str(ROOT / "training/configs/demo_mixlora.yaml"), "--max_steps", "1"]
CASES = {
    "train without accelerate": (("accelerate", "peft"), COMMAND.format(arguments=TRAIN), "molora[train]"),
    "bench without peft": (("peft",), COMMAND.format(arguments=["bench", "cpu"]), "molora[peft]"),
    "the harness without lm-eval": (("lm_eval",), "from molora.eval.harness import main\nmain()", "molora[harness]"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_extra_is_named(case: str, tmp_path: Path):
    packages, code, extra = CASES[case]
    done = subprocess.run(
        [sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r})\n" + BLOCK.format(packages=packages) + code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 2, done.stderr
    told = done.stderr.strip().splitlines()[-1]  # before it stand what other packages say when they are imported
    assert f"pip install '{extra}'" in told
    assert len(told) < 400
    assert "Traceback" not in done.stderr


def test_pictures_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'molora\[eval\]'"):
        load_heatmaps({"code": [[1.0]]}, ["a"], [1], "", tmp_path / "x.png")
