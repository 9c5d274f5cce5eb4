"""Checkpoints of molora's Trainer: what is whole is found, what is not is passed over, and errors say what to do."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import AdapterError, CheckpointError
from molora.load import restore
from molora.training import checkpoints, find_newest
from tests.support import tiny
from tests.support.behaviours import assert_same
from tests.support.folders import contents
from tests.support.training_runs import build, logged, run, state, trainer

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    run(build("mixlora"), folder, **SAVING)
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_newest_whole_checkpoint_is_found(folder: Path) -> None:
    assert find_newest(folder) == folder / "checkpoint-3"
    assert {p.name for p in folder.glob("*checkpoint*")} == {f"checkpoint-{n}" for n in (1, 2, 3)}


def test_no_checkpoint_is_none_and_resuming_says_so(tmp_path: Path) -> None:
    assert find_newest(tmp_path) is None
    assert find_newest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match='there is no checkpoint to resume from.*"auto"'):
        run(build("mixlora"), tmp_path, resume=True)
    assert run(build("mixlora"), tmp_path, resume="auto", max_steps=1).state.global_step == 1
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        run(build("mixlora"), tmp_path, resume=str(tmp_path / "checkpoint-9"))


def damages() -> Iterator[tuple[str, Any]]:
    """Ways to spoil a checkpoint, each with what the error says."""

    def flip(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)

    files = ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")
    for name in files:
        yield f"{name} was changed", lambda f, name=name: flip(f / name)
        yield f"{name} was changed", lambda f, name=name: os.truncate(f / name, 10)
        yield f"{name} is missing", lambda f, name=name: (f / name).unlink()
    yield "got no molora_manifest", lambda f: (f / checkpoints.MANIFEST).unlink()
    yield "cannot be read", lambda f: (f / checkpoints.MANIFEST).write_text("{")
    yield "got format 99", lambda f: (f / checkpoints.MANIFEST).write_text('{"format": 99, "files": {}, "run": {}}')
    outside = {"format": 1, "run": {}, "files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}
    yield "not below it", lambda f: (f / checkpoints.MANIFEST).write_text(json.dumps(outside))


@pytest.mark.parametrize(("said", "spoil"), list(damages()))
def test_what_is_not_whole_is_passed_over(said: str, spoil: Any, folder: Path) -> None:
    spoil(folder / "checkpoint-3")
    assert find_newest(folder) == folder / "checkpoint-2"
    with pytest.raises(CheckpointError, match=said):
        checkpoints.verify(folder / "checkpoint-3")
    spoil(folder / "checkpoint-2")
    spoil(folder / "checkpoint-1")
    with pytest.raises(CheckpointError, match="no whole checkpoint to resume from") as e:
        find_newest(folder)
    assert all(f"checkpoint-{n}" in str(e.value) for n in (1, 2, 3))


def test_resuming_another_mixture_or_process_number_names_the_difference(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="made by another run.*mixture: it has 'mixlora .*this run 'mola "):
        run(build("mola"), folder, resume=True)
    manifest = folder / "checkpoint-3" / checkpoints.MANIFEST
    text = json.loads(manifest.read_text())
    text["run"] |= {"engine": "DeepSpeed ZeRO-2", "processes": 8}
    manifest.write_text(json.dumps(text))
    with pytest.raises(CheckpointError, match="engine: it has 'DeepSpeed ZeRO-2', this run 'PyTorch'"):
        run(build("mixlora"), folder, resume=True)


def test_restore_copies_an_adapter_into_the_same_mixture_only(trained: Path) -> None:
    model = build("mixlora")
    before = state(model)
    with pytest.raises(AdapterError, match="holds another mixture than the model; they differ in placements, recipe"):
        restore(build("mola"), trained / "checkpoint-3")
    restore(model, trained / "checkpoint-3")
    assert any(not torch.equal(before[n], p) for n, p in state(model).items())
    again = build("mixlora")
    run(again, trained.parent / "again")
    assert_same(state(model), state(again))


def test_a_limit_on_their_number_removes_the_oldest(tmp_path: Path) -> None:
    run(build("mixlora"), tmp_path, **SAVING, save_total_limit=2)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path: Path) -> None:
    """A learning rate that ruins the model: the first step's adapter is the best."""
    model = build("mixlora")
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    it = trainer(model, tmp_path, **SAVING, **best, learning_rate=2.0, save_total_limit=1)
    it.train()
    losses = logged(it, "eval_loss")
    step = int(losses.argmin()) + 1
    assert step < 3
    assert it.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert abs(it.evaluate()["eval_loss"] - float(losses.min())) < 1e-6


def test_the_last_checkpoint_may_be_the_best(tmp_path: Path) -> None:
    """It is compared while it still lies in the staging folder; its own state names the place that it gets."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    it = run(build("mixlora"), tmp_path, **SAVING, **best, learning_rate=0.01, save_total_limit=1)
    assert int(logged(it, "eval_loss").argmin()) == 2
    place = str(tmp_path / "checkpoint-3")
    assert it.state.best_model_checkpoint == place
    assert json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["best_model_checkpoint"] == place
    assert find_newest(tmp_path) == Path(place)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kill can show a missing fsync, only a power cut can; so the order of the steps is checked."""
    synced: set[int] = set()
    real_sync, real_replace, renamed = os.fsync, os.replace, []

    def sync(descriptor: int) -> None:
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def replace(a: Any, b: Any) -> None:
        if Path(b).name == "checkpoint-1":
            everything = [p for p in Path(a).rglob("*")] + [Path(a)]
            missing = [p.name for p in everything if p.stat().st_ino not in synced]
            renamed.append((missing, len(everything)))
        real_replace(a, b)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    run(build("mixlora"), tmp_path, **SAVING, max_steps=1)
    (missing, count) = renamed[0]
    assert missing == []
    assert count > 8
    assert tmp_path.stat().st_ino in synced


@pytest.mark.parametrize("room", [100, 5000, 20000])
def test_a_disk_that_is_full_after_some_bytes(room: int, tmp_path: Path) -> None:
    """The kernel itself refuses the write: a limit on the size of files stands in for the disk."""
    run(build("mixlora"), tmp_path, **SAVING, max_steps=1)
    before = contents(tmp_path / "checkpoint-1")
    it = trainer(build("mixlora"), tmp_path, **SAVING, max_steps=2, logging_strategy="no")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(CheckpointError, match="checkpoint-2: the checkpoint could not be saved.*are unharmed"):
            it.train(resume_from_checkpoint=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert contents(tmp_path / "checkpoint-1") == before
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-1"]
    assert run(build("mixlora"), tmp_path, **SAVING, resume=True).state.global_step == 3


def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as name:  # not tmp_path: another user could not enter it
        folder = Path(name)
        run(build("mixlora"), folder, **SAVING, max_steps=1)
        shutil.copytree(folder, tmp_path / "twin")
        # Once as root: what Python imports on the way must be there, since another user may not read root's Python.
        run(build("mixlora"), tmp_path / "twin", **SAVING, resume=True, max_steps=2, log_routing=False)
        it = trainer(build("mixlora"), folder, **SAVING, max_steps=2, log_routing=False)
        root, mode = os.geteuid() == 0, stat.S_IMODE(folder.stat().st_mode)
        for path in (folder, *folder.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        if root:
            os.seteuid(65534)  # permissions mean nothing to root
        try:
            with pytest.raises(CheckpointError, match="could not be saved.*Permission denied"):
                it.train(resume_from_checkpoint=True)
        finally:
            if root:
                os.seteuid(0)
            for path in (folder, *folder.rglob("*")):
                path.chmod(mode)
        assert find_newest(folder) == folder / "checkpoint-1"


@pytest.mark.parametrize("recipe", ["mixlora", "smora", "xlora"])
def test_a_checkpoint_is_an_adapter_folder_too(recipe: str, tmp_path: Path) -> None:
    import molora

    model = build(recipe)
    run(model, tmp_path, **SAVING, max_steps=1)
    loaded = molora.load(tiny.base_model("llama"), tmp_path / "checkpoint-1").eval()
    inputs = tiny.batch("llama")
    assert torch.equal(tiny.output(loaded, inputs), tiny.output(model.eval(), inputs))
