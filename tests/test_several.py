"""Two processes train what one trains: every recipe, under DDP and ZeRO 1, 2 and 3, on losses, weights and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from tests import several, tiny
from tests.conftest import close
from tests.programs import program
from tests.several import ENGINES, KEYS, VARIANTS
from tests.training_runs import build

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "printed").write_text(program("tests.several", folder))
    return folder


_one: dict[tuple[str, str, int], dict[str, Any]] = {}


def one(recipe: str, variant: str, micro: int, folder: Path) -> dict[str, Any]:
    """One process with all eight rows of a step, in micro-batches of ``micro``."""
    if (recipe, variant, micro) not in _one:
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": several.ROWS // micro}
        _one[recipe, variant, micro] = several.train(recipe, variant, folder, **sizes)[1]
    return _one[recipe, variant, micro]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Losses, balance losses, statistics of the routing, and every trained tensor."""
    for key in KEYS:
        assert a["logged"][key].shape == b["logged"][key].shape, key
        close(a["logged"][key], b["logged"][key], "additive")
    assert a["state"].keys() == b["state"].keys()
    for name, t in a["state"].items():
        close(t, b["state"][name], "additive")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", tiny.RECIPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one(engine: str, recipe: str, variant: str, two: Path, tmp_path: Path) -> None:
    path = two / f"{engine}-{recipe}-{variant}.pt"
    assert path.exists(), (two / "printed").read_text()[-3000:]
    both = torch.load(path)
    assert "error" not in both, both["error"]
    assert both["engine"] == ("DistributedDataParallel" if engine == "ddp" else f"DeepSpeedEngine {engine[-1]}")
    assert both["logged"]["loss"].numel() == 3
    same(both, one(recipe, variant, several.ROWS, tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_one_process_that_accumulates_is_one(recipe: str, variant: str, tmp_path: Path) -> None:
    same(one(recipe, variant, several.ROWS // 2, tmp_path), one(recipe, variant, several.ROWS, tmp_path))


@pytest.mark.parametrize("recipe", ["mixlora", "mola", "smora", "llava_mole", "meteora"])
def test_the_rows_kept_apart_use_different_experts(recipe: str) -> None:
    """Or the equality above would say nothing of experts that one process uses and the other does not."""
    model = build(recipe)
    rows = several.rows_of("apart", model)
    used = []
    for own in (rows[:4], rows[4:]):
        batch = {k: torch.tensor([row[k] for row in own]) for k in ("input_ids", "attention_mask")}
        with molora.record_routing(model) as tape, torch.no_grad():
            model(**batch)
        routed = {s: records[0] for s, records in tape.items() if records[0].num_experts > 1}
        used.append({s: set(r.slot_ids()[r.valid].flatten().tolist()) for s, r in routed.items()})
    first, second = used
    assert sum(first[s] != second[s] for s in first) >= len(first) / 2
    assert any(first[s] - second[s] for s in first)
