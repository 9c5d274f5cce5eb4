"""Two processes train what one trains: every recipe, under DDP and ZeRO 1, 2 and 3, on losses, weights and routing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from tests.support import several, tiny
from tests.support.programs import program
from tests.support.several import ENGINES, KEYS, VARIANTS
from tests.support.tolerances import close
from tests.support.training_runs import build
from tests.support.traits import having, traits
from tests.training.test_hf_trainer import STRONG

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    (folder / "printed").write_text(program("tests.support.several", folder))
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


def read(two: Path, name: str) -> dict[str, Any]:
    path = two / f"{name}.pt"
    assert path.exists(), (two / "printed").read_text()[-3000:]
    result: dict[str, Any] = torch.load(path)
    assert "error" not in result, result["error"]
    return result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", tiny.RECIPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one(engine: str, recipe: str, variant: str, two: Path, tmp_path: Path) -> None:
    both = read(two, f"{engine}-{recipe}-{variant}")
    assert both["engine"] == ("DistributedDataParallel" if engine == "ddp" else f"DeepSpeedEngine {engine[-1]}")
    assert both["logged"]["loss"].numel() == 3
    same(both, one(recipe, variant, several.ROWS, tmp_path))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_one_process_that_accumulates_is_one(recipe: str, variant: str, tmp_path: Path) -> None:
    same(one(recipe, variant, several.ROWS // 2, tmp_path), one(recipe, variant, several.ROWS, tmp_path))


@pytest.mark.parametrize("recipe", having(lambda t: t.picks))
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


@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_fully_shard_in_a_plain_loop_is_one(recipe: str, two: Path) -> None:
    """torch's FSDP2, without a Trainer."""
    model = build(recipe).train()
    rows = several.rows_of("mixed", model)
    losses = several.plain_loop(model, rows, rows)
    found = read(two, f"fsdp2-{recipe}")
    assert len(found["losses"]) == len(losses)
    for name, p in model.named_parameters():
        if p.requires_grad:
            close(found["state"][name], p.detach(), "additive")


@pytest.mark.parametrize("recipe", STRONG)
def test_batch_scope_takes_f_over_all_processes(recipe: str, two: Path) -> None:
    """``sum over processes of n / N E sum_e f_e P_e``, f of all tokens and P of the process's own, by loops."""
    model = build(recipe, balance_scope="batch")
    rule = traits(model).switch
    assert rule is not None
    rows = several.rows_of("mixed", model)
    N = sum(label != -100 for row in rows for label in row["labels"][1:])
    wanted, parts = 0.0, []
    for own in (rows[:4], rows[4:]):
        batch = {k: torch.tensor([row[k] for row in own]) for k in own[0]}
        with molora.record_routing(model) as tape, torch.no_grad():
            wanted += float(model.eval()(**batch, num_items_in_batch=N).loss)
        n = sum(label != -100 for row in own for label in row["labels"][1:])
        parts.append((n / N, {s: records[0] for s, records in tape.items() if records[0].num_experts > 1}))
    for site in parts[0][1]:
        E = parts[0][1][site].num_experts
        f, tokens = [0.0] * E, 0
        for _, records in parts:
            r = records[site]
            for t in r.valid.nonzero().flatten().tolist():
                chosen = r.ids[t].tolist()[: 1 if rule.count == "argmax" else None]
                for e in chosen:
                    f[e] += 1 / len(chosen)
                tokens += 1
        for share, records in parts:
            P = records[site].probs[records[site].valid].mean(0).tolist()
            value = E * sum(a / tokens * b for a, b in zip(f, P, strict=True))
            wanted += rule.coef * share * value / len(parts[0][1])
    close(read(two, f"batch-{recipe}")["logged"]["loss"][:1], torch.tensor([wanted]), "additive")


def test_a_loss_that_is_not_finite_in_one_process_stops_both(two: Path) -> None:
    well, broken = read(two, "not-finite")["said"]
    assert well.startswith("step 1: the loss is not finite; on this process no module shows it")
    assert broken.startswith("step 1: the loss is not finite, first in model.embed_tokens (Embedding), in its weight")
