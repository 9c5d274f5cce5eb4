"""The adapter folder: what it holds, what comes back, what it is not saved over, and which base it belongs to."""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from safetensors.torch import save as library_save

import molora
from molora.adapter.folder import expected_tensors, load_tensors, read_adapter
from molora.config.site import SiteConfig
from molora.errors import CheckpointError
from tests.support import behaviours, tiny
from tests.support.folders import FINGERPRINT, contents, load, save, small_config, small_sites, small_tensors
from tests.support.places import FIXTURES


def test_what_is_saved_comes_back(tmp_path: Path):
    save(tmp_path)
    adapter = read_adapter(tmp_path)
    assert adapter.config == small_config()
    assert adapter.sites == small_sites()
    assert adapter.fingerprint == FINGERPRINT
    assert adapter.tensors == {n: (tuple(t.shape), t.dtype) for n, t in small_tensors().items()}
    behaviours.assert_same(load_tensors(adapter), small_tensors())


def test_format_1_stays_readable():
    adapter = read_adapter(FIXTURES / "format_1")
    assert (adapter.config, adapter.sites, adapter.fingerprint) == (small_config(), small_sites(), FINGERPRINT)
    behaviours.assert_same(load_tensors(adapter), small_tensors())


def test_the_folder_is_pefts_layout_and_nothing_else(tmp_path: Path):
    save(tmp_path / "deep" / "new")
    files = contents(tmp_path / "deep" / "new")
    assert files.keys() == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads(files["adapter_config.json"])
    assert config["peft_type"] == "MOLORA"
    assert config["base_model_name_or_path"] == "org/base"
    assert config["target_modules"] == ["up"]
    assert files["README.md"] == b"a molora adapter"
    assert all(
        key.startswith("base_model.model.layers.") for key in load_file(tmp_path / "deep/new/adapter_model.safetensors")
    )


def test_a_second_save_is_byte_identical(tmp_path: Path):
    first = contents(save(tmp_path))
    backwards = dict(reversed(small_tensors().items()))
    assert contents(save(tmp_path, backwards)) == first
    assert contents(save(tmp_path / "elsewhere")) == first


def test_the_weights_are_the_librarys_bytes(tmp_path: Path):
    tensors = small_tensors()
    tensors["layers.0.up.bank.lora_A"] = tensors["layers.0.up.bank.lora_A"].to(torch.bfloat16)
    tensors["layers.0.up.bank.lora_B"] = torch.randn(4, 6, dtype=torch.float64).t()
    tensors["layers.1.up.bank.lora_A"] = tensors["layers.1.up.bank.lora_A"].to(torch.float16)
    save(tmp_path, tensors)
    named = {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}
    assert contents(tmp_path)["adapter_model.safetensors"] == library_save(named, metadata={"format": "pt"})
    behaviours.assert_same(load(tmp_path), tensors)


def test_paths_of_ready_made_adapters_stay_private(tmp_path: Path):
    model = behaviours.armed("meteora", "llama")
    folders = [folder for _, folder in model._molora.config.adapters]
    assert all(folders)
    model.save_pretrained(tmp_path)
    for data in contents(tmp_path).values():
        assert not any(os.path.dirname(folder).encode() in data for folder in folders)
    assert [n for n, _ in read_adapter(tmp_path).config.adapters] == [n for n, _ in model._molora.config.adapters]


@behaviours.each_recipe
def test_the_sites_say_which_tensors_there_are(recipe: str, name: str, tmp_path: Path):
    model = behaviours.armed(recipe, name)
    model.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    expected = expected_tensors(adapter.config, adapter.sites)
    found = {n: shape for n, (shape, _) in adapter.tensors.items()}
    assert found.keys() == expected.keys()
    for n, shape in expected.items():
        assert [a for a, b in zip(shape, found[n], strict=True) if a not in (b, -1)] == [], n
    state = model.state_dict()
    assert {n for n, p in model.named_parameters() if p.requires_grad} <= expected.keys()
    behaviours.assert_same(load_tensors(adapter), {n: state[n] for n in expected})


def test_unequal_ranks_and_a_shared_router():
    config = molora.recipes.llava_mole(r=4)
    shape: dict[str, Any] = {"placement": 0, "in_features": 3, "out_features": 5, "num_experts": 3, "scales": (1.0,)}
    lead = SiteConfig(path="mlp.up", block="mlp", ranks=(1, 0, 4), **shape)
    follower = SiteConfig(path="mlp.gate", block="mlp", lead=False, ranks=(2,), **shape)
    empty = SiteConfig(path="mlp", block="mlp", role="rows", ranks=(), **shape)
    assert expected_tensors(config, [lead, follower]) == {
        "mlp.up.bank.lora_A": (5, 3),
        "mlp.up.bank.lora_B": (5, 5),
        "mlp.up.router.weight": (3, 3),
        "mlp.up.router.bias": (3,),
        "mlp.gate.bank.lora_A": (6, 3),
        "mlp.gate.bank.lora_B": (5, 6),
    }
    assert list(expected_tensors(config, [empty])) == ["mlp.router.weight", "mlp.router.bias"]


def test_trained_copies_of_modules_come_on_top(tmp_path: Path):
    model = molora.convert(tiny.base_model("bert"), "lora", r=2, modules_to_save=["classifier"])
    with torch.no_grad():
        model.classifier.trained.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    tensors = load(tmp_path)
    assert {n for n in tensors if ".trained." in n} == {"classifier.trained.weight", "classifier.trained.bias"}
    again = molora.load(tiny.base_model("bert"), tmp_path)
    assert torch.equal(again.classifier.trained.weight, model.classifier.trained.weight)


FOREIGN = {
    "a full model": ("model.safetensors", b"x"),
    "a sharded model": ("model-00001-of-00002.safetensors", b"x"),
    "an index": ("model.safetensors.index.json", b"{}"),
    "a pickled model": ("pytorch_model.bin", b"x"),
    "a pickled adapter": ("adapter_model.bin", b"x"),
    "weights without a config": ("adapter_model.safetensors", b"x"),
    "another adapter": ("adapter_config.json", b'{"peft_type": "LORA"}'),
    "a broken config": ("adapter_config.json", b"{"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_saving_over_somebody_elses_model_is_refused(case: str, tmp_path: Path):
    name, data = FOREIGN[case]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name if case != "a broken config" else "cannot be read"):
        save(tmp_path)
    assert contents(tmp_path) == {name: data}


def test_what_a_trainer_writes_may_lie_beside(tmp_path: Path):
    names = (
        "optimizer.pt",
        "trainer_state.json",
        "training_args.bin",
        "tokenizer.json",
        "rng_state.pth",
        "config.json",
    )
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoint-3").mkdir()
    save(tmp_path)
    assert all((tmp_path / name).read_text() == "x" for name in names)
    load(tmp_path)


def test_somebodys_own_readme_is_kept(tmp_path: Path):
    (tmp_path / "README.md").write_text("my project")
    save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "my project"
    (tmp_path / "README.md").write_text("an older molora card")
    save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "a molora adapter"


def change(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    changed = {**small_tensors(), name: value}
    return {n: t for n, t in changed.items() if t is not None}


A = "layers.0.up.bank.lora_A"
UNFIT = {
    "missing": (change(A, None), "missing"),
    "extra": (change("layers.0.up.weight", torch.ones(2)), "not expected"),
    "a trained copy that the config does not name": (change("head.trained.weight", torch.ones(2)), "not expected"),
    "shape": (change(A, torch.ones(4, 5)), r"\(4, 5\)"),
    "integers": (change(A, torch.ones(4, 4).long()), "floating point"),
    "NaN": (change(A, torch.full((4, 4), math.nan)), "NaN"),
    "infinity": (change(A, torch.full((4, 4), math.inf)), "infinite"),
    "no storage": (change(A, torch.ones(4, 4, device="meta")), "meta"),
    "sparse": (change(A, torch.eye(4).to_sparse()), "sparse"),
    "complex": (change(A, torch.ones(4, 4, dtype=torch.complex64)), "complex"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_could_not_be_read_again_are_not_saved(case: str, tmp_path: Path):
    tensors, words = UNFIT[case]
    before = contents(save(tmp_path))
    with pytest.raises(CheckpointError, match=words):
        save(tmp_path, tensors)
    assert contents(tmp_path) == before


def test_a_config_that_no_reader_would_take_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    length = len(contents(save(tmp_path))["adapter_config.json"])
    monkeypatch.setattr("molora.adapter.atomic_save.CONFIG_LIMIT", length - 1)
    with pytest.raises(CheckpointError, match="config takes"):
        save(tmp_path / "new")
    assert contents(tmp_path / "new") == {}


def test_the_name_of_the_base_may_be_edited(tmp_path: Path):
    save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("org/base", "me/moved"))
    assert read_adapter(tmp_path).fingerprint["base_model_name_or_path"] == "me/moved"


def test_a_folder_reached_by_a_link_is_a_folder(tmp_path: Path):
    save(tmp_path / "real")
    (tmp_path / "latest").symlink_to("real")
    load(tmp_path / "latest")
    save(tmp_path / "latest", small_tensors(2.0))
    assert load(tmp_path / "real")[A][0, 0] == 2.0


def test_reading_closes_what_it_opened():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        before = descriptors()
        for _ in range(20):
            load(Path(folder))
        assert descriptors() == before
