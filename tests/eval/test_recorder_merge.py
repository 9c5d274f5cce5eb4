"""Recordings of shards, ranks and files put together are the recording of the whole, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import distributed

from molora.errors import ConfigError
from molora.eval.counting import stats
from molora.eval.counting.stats import RoutingStats, merge, over_processes
from tests.support import tiny
from tests.support.launched import free_port
from tests.support.recorded import BATCHES, same, stats_of


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_merged_shards_are_the_whole_bit_by_bit(recipe: str, tmp_path: Path) -> None:
    model = tiny.converted(recipe, "llama", tmp_path)
    options = {"samples": 2, "seed": 3}
    whole = stats_of(model, BATCHES, **options)
    first, second = stats_of(model, BATCHES[:2], **options), stats_of(model, BATCHES[2:], **options)
    same(merge(first, second), whole)
    same(merge(second, first), whole)
    same(stats_of(model, BATCHES[::-1], **options), whole)


def one_of_two(rank: int, port: int, root: Path) -> None:
    """What each process records, and saves after the merge."""
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    model = tiny.converted("mixlora", "llama", root / str(rank))
    tensors, meta = over_processes(stats_of(model, BATCHES[rank::2])).state()
    (root / f"{rank}.json").write_text(json.dumps(meta))
    (root / f"{rank}.bin").write_bytes(save(tensors))
    distributed.destroy_process_group()


@pytest.mark.dist
def test_processes_together_have_the_whole(tmp_path: Path) -> None:
    whole = stats_of(tiny.converted("mixlora", "llama", tmp_path), BATCHES)
    same(over_processes(whole), whole)
    context, port = multiprocessing.get_context("spawn"), free_port()
    running = [context.Process(target=one_of_two, args=(rank, port, tmp_path), daemon=True) for rank in (0, 1)]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert codes == [0, 0]
    for rank in (0, 1):
        meta = json.loads((tmp_path / f"{rank}.json").read_text())
        same(RoutingStats.from_state(load((tmp_path / f"{rank}.bin").read_bytes()), meta), whole)


def test_documents_beyond_the_limit_are_pooled_alike_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    apart = stats_of(model, BATCHES)
    monkeypatch.setattr(stats, "UNITS", 7)
    whole = stats_of(model, BATCHES)
    assert len(apart.units) == 18 > 7 >= len(whole.units) >= 4
    assert torch.equal(whole.documents()[0].sum(0), apart.documents()[0].sum(0))
    assert whole.domains() == ["a", "b", "c"]
    same(stats_of(model, BATCHES[::-1]), whole)
    same(merge(stats_of(model, BATCHES[4:]), stats_of(model, BATCHES[:4])), whole)


def test_a_state_survives_files(tmp_path: Path) -> None:
    recorded = stats_of(tiny.converted("meteora", "llama", tmp_path), BATCHES)
    tensors, meta = recorded.state()
    same(RoutingStats.from_state(load(save(tensors)), json.loads(json.dumps(meta))), recorded)
    with pytest.raises(ConfigError, match="schema"):
        RoutingStats.from_state(tensors, {**meta, "schema": 99})


def test_unlike_recordings_do_not_merge(tmp_path: Path) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    with pytest.raises(ConfigError, match="differ in seed"):
        merge(stats_of(model, BATCHES[:1], seed=0), stats_of(model, BATCHES[:1], seed=1))
