"""What users import by the names of the first edition stays where it was, as the same object."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

# Old place: (new place, names). Nothing else may stand in the old module.
MOVED = {
    "molora.interop.eva": ("molora.initialisers.eva", ["init_eva"]),
    "molora.interop.corda": ("molora.initialisers.corda", ["init_corda"]),
    "molora.interop.lora_ga": ("molora.initialisers.lora_ga", ["init_lora_ga"]),
    "molora.eval.watch": ("molora.eval.counting.watch", ["collect_routing"]),
    "molora.eval.summary": ("molora.eval.counting.summary", ["summary"]),
    "molora.config": ("molora.config.placements", ["MoloraConfig", "Placement"]),
    "molora.training.preference": ("molora.training.preference.trainers", ["DPOTrainer", "GRPOTrainer"]),
}
STAYED = {
    "molora.config": ["RouterConfig", "GateConfig", "BalanceConfig"],
    "molora.eval.harness": ["main", "register"],
    "molora.interop.export": ["export_xlora"],
    "molora.interop.to_lora": ["to_lora"],
    "molora.kernels.functional": ["rank_mix"],
    "molora.training.settings": ["TrainingArguments"],
    "molora.training.sft": ["SFTTrainer"],
}


@pytest.mark.parametrize("old", MOVED)
def test_a_moved_name_is_the_same_object(old: str) -> None:
    new, names = MOVED[old]
    before, now = importlib.import_module(old), importlib.import_module(new)
    assert all(getattr(before, name) is getattr(now, name) for name in names)


@pytest.mark.parametrize("module", STAYED)
def test_a_name_that_stayed_is_there(module: str) -> None:
    found = importlib.import_module(module)
    assert all(hasattr(found, name) for name in STAYED[module])


@pytest.mark.parametrize("module", ["molora", "molora.cli"])
def test_the_command_line_runs_as_a_module(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "molora train" in done.stdout or "train" in done.stdout
