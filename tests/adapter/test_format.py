"""Adapter folders of every format that was released stay readable and compute what they did."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import molora
from molora.adapter.config import FORMAT
from molora.errors import AdapterError
from tests.support.folders import contents, forge, save
from tests.support.format_fixture import OPTIONS, base, outputs
from tests.support.places import FIXTURES
from tests.support.tolerances import close

DATA = FIXTURES


def test_the_present_format_has_folders_of_the_recipes_that_it_began_with():
    """Whoever raises the number commits folders of the new one and a way to read the old ones."""
    assert {p.name for p in DATA.glob("format_*")} == {"format_1", "format_1_models"}
    assert FORMAT == 1
    assert {p.name for p in (DATA / "format_1_models").iterdir()} == set(OPTIONS) <= set(molora.RECIPES)
    assert sum(p.stat().st_size for p in DATA.rglob("*") if p.is_file()) < 100_000


@pytest.mark.parametrize("recipe", OPTIONS)
def test_a_folder_of_format_1_computes_what_it_did(recipe: str):
    folder = DATA / "format_1_models" / recipe
    # The base's fingerprint depends on transformers' own config, which is not what this test is about.
    model = molora.load(base(), folder, ignore_base=True)
    recorded = torch.tensor(json.loads((folder / "outputs.json").read_text()))
    close(outputs(model).flatten(), recorded, "same_math_fp32")
    assert (recorded - outputs(base()).flatten()).abs().max() > 0.05
    assert model._molora.config.recipe == recipe


@pytest.mark.parametrize("recipe", OPTIONS)
def test_saving_it_again_gives_the_same_weights(recipe: str, tmp_path: Path):
    folder = DATA / "format_1_models" / recipe
    molora.load(base(), folder, ignore_base=True).save_pretrained(tmp_path)
    name = "adapter_model.safetensors"
    assert contents(tmp_path)[name] == contents(folder)[name]


def test_a_newer_format_says_to_upgrade(tmp_path: Path):
    forge(save(tmp_path), edit=lambda c: c.update(molora_format=FORMAT + 1))
    with pytest.raises(AdapterError, match=rf"format {FORMAT + 1}, this molora reads up to {FORMAT}; upgrade molora"):
        molora.load(base(), tmp_path)


def test_the_kernels_first_name_is_read_and_kept(tmp_path: Path):
    model = molora.load(base(), DATA / "format_1_models" / "mola", ignore_base=True)
    expected = outputs(model)
    model._molora.config = model._molora.config.replace(kernel="concat")
    model.save_pretrained(tmp_path)
    again = molora.load(base(), tmp_path)
    assert again._molora.config.kernel == "concat"
    assert torch.equal(outputs(again), expected)
