"""Hostile and damaged adapter folders: one AdapterError each, the model as it was, no code run, no file opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors

import molora
from molora.adapter.folder import load_tensors, read_adapter
from molora.errors import AdapterError
from tests.support import attacks, behaviours, tiny
from tests.support.folders import contents, forge
from tests.support.folders import load as load_small
from tests.support.folders import save as save_small
from tests.support.places import ROOT

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SECONDS = 1.0  # of processor time for one refusal: what other programs do beside it does not count


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that loads: routers with and without a bias for the choice, ranks as experts."""
    folder = tmp_path_factory.mktemp("attacks") / "good"
    behaviours.armed("smora", "llama").save_pretrained(folder)
    molora.load(tiny.base_model("llama"), folder)
    return folder


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "adapter"))


@pytest.fixture(scope="module")
def base() -> Any:
    return tiny.base_model("llama", trainable=True)


def refused(base: Any, folder: Path) -> str:
    """Loading raises one AdapterError that names the folder, quickly, and leaves the model as it was."""
    before, start = behaviours.snapshot(base), time.thread_time()
    with pytest.raises(AdapterError) as e:
        molora.load(base, folder)
    assert time.thread_time() - start < SECONDS
    assert behaviours.snapshot(base) == before
    assert str(folder) in str(e.value)
    assert len(str(e.value)) < 4000
    return str(e.value)


@pytest.mark.parametrize("case", attacks.FORGED_WEIGHTS)
def test_forged_weights(case: str, base: Any, folder: Path):
    weights = (folder / WEIGHTS).read_bytes()
    forged = attacks.FORGED_WEIGHTS[case](weights)
    assert forged != weights
    said = refused(base, forge(folder, weights=forged))
    assert "sha256" not in said, "another check must find this"


@pytest.mark.parametrize("case", attacks.DAMAGED_WEIGHTS)
def test_damaged_weights(case: str, base: Any, folder: Path):
    weights = (folder / WEIGHTS).read_bytes()
    damaged = attacks.DAMAGED_WEIGHTS[case](weights)
    assert damaged != weights
    (folder / WEIGHTS).write_bytes(damaged)
    safetensors.deserialize(damaged)  # the library takes it
    assert "sha256" in refused(base, folder)


@pytest.mark.parametrize("case", attacks.FORGED_CONFIGS)
def test_forged_config(case: str, base: Any, folder: Path):
    said = refused(base, forge(folder, edit=attacks.FORGED_CONFIGS[case]))
    assert "checksum" not in said, "another check must find this"


@pytest.mark.parametrize("case", attacks.RAW_CONFIGS)
def test_damaged_config(case: str, base: Any, folder: Path):
    text = (folder / CONFIG).read_bytes()
    damaged = attacks.RAW_CONFIGS[case](text)
    assert damaged != text
    (folder / CONFIG).write_bytes(damaged)
    refused(base, folder)


# What only a comparison with the model can find.
NEEDS_A_MODEL = {"path to nowhere", "path to another module", "path to no linear", "absolute path", "another base"}
FORGED = [("weights", n) for n in attacks.FORGED_WEIGHTS]
FORGED += [("config", n) for n in attacks.FORGED_CONFIGS if n not in NEEDS_A_MODEL]


@pytest.mark.parametrize(("file", "case"), FORGED)
def test_forgeries_are_found_without_a_model(file: str, case: str, tmp_path: Path):
    folder = save_small(tmp_path)
    if file == "weights":
        forge(folder, weights=attacks.FORGED_WEIGHTS[case](contents(folder)[WEIGHTS]))
    else:
        forge(folder, edit=attacks.FORGED_CONFIGS[case])
    with pytest.raises(AdapterError, match=str(folder)):
        load_small(folder)


def test_a_newer_format_says_to_upgrade(base: Any, folder: Path):
    assert "upgrade molora" in refused(base, forge(folder, edit=attacks.FORGED_CONFIGS["newer format"]))


def test_files_of_great_size_are_not_read(base: Any, folder: Path, good: Path):
    os.truncate(folder / CONFIG, 200 << 20)  # sparse: 200 MB of nothing behind the config
    refused(base, folder)
    shutil.copy(good / CONFIG, folder / CONFIG)
    with open(folder / WEIGHTS, "r+b") as file:
        file.write((101 << 20).to_bytes(8, "little"))
        file.truncate(300 << 20)
    refused(base, folder)


def test_nan_can_be_let_in_by_name(folder: Path):
    weights = attacks.FORGED_WEIGHTS["NaN"]((folder / WEIGHTS).read_bytes())
    adapter = read_adapter(forge(folder, weights=weights))
    with pytest.raises(AdapterError, match="NaN"):
        load_tensors(adapter)
    assert sum(int(t.isnan().sum()) for t in load_tensors(adapter, allow_nan=True).values()) == 1


def test_weights_that_change_after_the_check_are_refused(tmp_path: Path):
    adapter = read_adapter(save_small(tmp_path))
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-3] ^= 1
    with open(tmp_path / WEIGHTS, "r+b") as file:  # the same file, not another in its place
        file.write(data)
    with pytest.raises(AdapterError, match="changed while it was read"):
        load_tensors(adapter)
    os.truncate(tmp_path / WEIGHTS, len(data) - 1)
    with pytest.raises(AdapterError, match="shorter"):
        load_tensors(adapter)


def put(path: Path, kind: str, outside: Path) -> None:
    """Something that is not a plain file, in the place of one."""
    data = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        outside.write_bytes(data)
        path.symlink_to(outside if kind == "absolute" else os.path.relpath(outside, path.parent))


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "dangling", "absolute", "relative"])
@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_only_plain_files_are_opened(name: str, kind: str, base: Any, folder: Path, tmp_path: Path):
    put(folder / name, kind, tmp_path / "outside")
    assert name in refused(base, folder)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d.rmdir(), "no such folder"),
        (lambda d: None, "nothing in it"),
        (lambda d: (d / "checkpoint-20").mkdir(), "training run (checkpoint-20)"),
        (lambda d: (d / "optimizer.pt").write_bytes(b""), "training checkpoint"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), "full model"),
        (lambda d: (d / "adapter_model.bin").write_bytes(b""), "pickle"),
        (lambda d: (d / "notes.txt").write_bytes(b""), "notes.txt"),
        (lambda d: (d.rmdir(), d.write_text("x")), "no such folder"),
    ],
)
def test_a_folder_that_is_no_adapter_is_named(make: Any, words: str, base: Any, tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    assert words in refused(base, folder)


PATTERN = r"(\w+\.?)+!"  # takes minutes on the name of one module
HARMLESS: dict[str, Any] = {
    "a pattern that never ends": attacks.config(
        target_modules=PATTERN, exclude_modules=[PATTERN], rank_pattern=[[PATTERN, 4]]
    ),
    "paths of ready-made adapters": attacks.config(init_from="/etc"),
    "a base by a path": lambda c: c.update(base_model_name_or_path="../../../etc"),
}


@pytest.fixture(scope="module")
def watched(good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a process with the audit hook on saw while it loaded each hostile folder; no canary may have appeared."""
    root = tmp_path_factory.mktemp("watched")
    canary = root / "canary"
    bomb = pickle.dumps(attacks.Bomb(str(canary)))
    code = f"import os; os.system('touch {canary}')"
    cases = [f"edit {n}" for n in attacks.FORGED_CONFIGS] + [f"weights {n}" for n in attacks.FORGED_WEIGHTS]
    folders = {n: Path(shutil.copytree(good, root / f"{i}")) for i, n in enumerate([*cases, *HARMLESS])}
    for name in cases:
        kind, _, case = name.partition(" ")
        if kind == "edit":
            forge(folders[name], edit=attacks.FORGED_CONFIGS[case])
        else:
            forge(folders[name], weights=attacks.FORGED_WEIGHTS[case]((folders[name] / WEIGHTS).read_bytes()))
    for name, edit in HARMLESS.items():
        forge(folders[name], edit=edit)
    folders["beside"] = Path(shutil.copytree(good, root / "beside"))
    for file in ("adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "training_args.bin", "adapter_model.pkl"):
        (folders["beside"] / file).write_bytes(bomb)
    for file in ("adapter.py", "modeling_llama.py", "configuration_llama.py", "conftest.py", "__init__.py"):
        (folders["beside"] / file).write_text(code)
    folders["bomb"] = forge(Path(shutil.copytree(good, root / "bomb")), weights=bomb)
    command = [sys.executable, "-m", "tests.support.watched", str(good), *map(str, folders.values())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    assert not canary.exists()
    return dict(zip(folders, json.loads(run.stdout), strict=True))


def test_no_code_runs_and_no_file_outside_is_opened(watched: dict[str, dict[str, Any]]):
    assert {n: w["events"] for n, w in watched.items() if w["events"]} == {}
    loaded = {n for n, w in watched.items() if w["said"] == "loaded"}
    assert loaded == {*HARMLESS, "beside"}
    assert {w["said"] for n, w in watched.items() if n not in loaded} == {"refused"}


def test_hostile_folders_cost_little(watched: dict[str, dict[str, Any]]):
    assert {n: w["seconds"] for n, w in watched.items() if w["seconds"] > SECONDS} == {}
    assert {n: w["bytes"] for n, w in watched.items() if w["bytes"] > 50e6} == {}


def test_the_canary_sings(tmp_path: Path):
    """The bomb works: an ordinary unpickling sets it off, so its silence above means something."""
    pickle.loads(pickle.dumps(attacks.Bomb(str(tmp_path / "canary"))))
    assert (tmp_path / "canary").exists()
