"""The README.md of an adapter folder: what the Hub reads, an example that runs, and what an evaluation found."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load

import molora
from molora.adapter.card_section import OPENING, put, without
from molora.adapter.folder import read_adapter
from molora.errors import AdapterError, ConfigError
from molora.eval.page.card import routing_section, write_card
from molora.eval.verdict import verdict
from tests.support import documents, tiny
from tests.support.folders import save, small_tensors
from tests.support.training_runs import build, trainer

PIPELINES = {
    "llama": "text-generation", "bert": "text-classification", "vit": "image-classification",
    "whisper": "automatic-speech-recognition", "t5": None, "clip": None,
}  # fmt: skip


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def named(name: str, path: str) -> Any:
    model = tiny.base_model(name)
    model.config._name_or_path = path
    return model


@pytest.mark.parametrize("name", PIPELINES)
def test_the_hub_reads_what_the_adapter_is(name: str, tmp_path: Path) -> None:
    molora.convert(named(name, "org/base"), "mola", r=2).save_pretrained(tmp_path)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("org/base", "molora", PIPELINES[name])
    assert data.base_model_relation == "adapter"
    assert {"molora", "mola", "lora"} <= set(data.tags)


@pytest.mark.parametrize("path", ["", "/home/me/models/base", "a folder", "{here}"])
def test_a_base_from_a_folder_is_no_entry_for_the_hub_which_would_refuse_the_card(path: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    here = os.path.relpath(tmp_path / "runs")
    molora.convert(named("llama", path.format(here=here)), "lora", r=2).save_pretrained(tmp_path / "a")
    assert metadata_load(tmp_path / "a" / "README.md").keys() == {"library_name", "tags", "pipeline_tag"}


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_the_example_runs_and_gives_the_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.base_model(name).save_pretrained(tmp_path / "base")
    base = type(tiny.base_model(name)).from_pretrained(tmp_path / "base")
    model = tiny.arm(molora.convert(base, "mola", r=2)).eval()
    model.save_pretrained(tmp_path / "path" / "to" / "this" / "folder")
    code = card_of(tmp_path / "path" / "to" / "this" / "folder").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    exec(code, space)  # the card's own example
    inputs = tiny.batch(name)
    assert torch.equal(tiny.output(space["model"].eval(), inputs), tiny.output(model, inputs))
    assert "molora.from_pretrained" in code


class Own(tf.LlamaForCausalLM):
    """A class that is not one of transformers'."""


def test_the_example_for_a_class_that_transformers_does_not_have_leaves_the_base_to_the_reader(tmp_path: Path) -> None:
    molora.convert(Own(tiny.base_model("llama").config), "lora", r=2).save_pretrained(tmp_path)
    assert "base = ...  # the base model, a Own\nmodel = molora.load(base, " in card_of(tmp_path)


def test_the_sizes_are_those_of_the_saved_tensors(tmp_path: Path) -> None:
    model = molora.convert(tiny.base_model("bert"), "mola", r=2, modules_to_save=["classifier"])
    model.save_pretrained(tmp_path)
    sizes = dict(line.strip("| ").split(" | ") for line in card_of(tmp_path).splitlines() if line.startswith("| "))
    found = sum(int(n.replace(",", "")) for n in sizes.values() if n[0].isdigit())
    assert found == sum(torch.Size(shape).numel() for shape, _ in read_adapter(tmp_path).tensors.values())
    assert sizes["modules trained whole"] == f"{sum(p.numel() for p in model.classifier.trained.parameters()):,}"


def test_the_trainers_card_of_a_run_does_not_replace_the_adapters(tmp_path: Path) -> None:
    it = trainer(build("mixlora"), tmp_path)
    it.create_model_card(model_name="run")
    assert "generated_from_trainer" in card_of(tmp_path)
    (tmp_path / "README.md").unlink()
    it.save_model()
    before = ModelCard.load(tmp_path / "README.md")
    it.create_model_card(model_name="run", tags=["law"])  # what its push_to_hub does
    after = ModelCard.load(tmp_path / "README.md")
    assert (after.text, after.data.tags) == (before.text, [*before.data.tags, "law"])


# ---- what an evaluation found ----


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The document of a small mixture on three domains with hostile names; its adapter is :func:`adapter`'s."""
    found = documents.document("mixlora", tmp_path_factory.mktemp("evaluated"))
    return {**found, "ablation": documents.ablation(0)}


def of(found: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same document, as if made of the adapter in ``folder``."""
    provenance = {**found["provenance"], "adapter": {"folder": "x", "sha256": read_adapter(folder).sha256}}
    return {**found, "provenance": provenance}


def test_the_section_says_what_was_found_and_on_what(evaluated: dict[str, Any]) -> None:
    text = routing_section(evaluated)
    for statement in verdict(evaluated):
        assert f"- **{statement.title}.** {statement.text}" in text
    shuffled = next(i for i in evaluated["ablation"]["interventions"] if i["name"] == "shuffled")["delta"]["code"]
    row = next(line for line in text.splitlines() if line.startswith("| code |"))
    assert f"| 2.000 | {shuffled['value']:+.3f} ({shuffled['low']:+.3f} to {shuffled['high']:+.3f}) |" in row
    assert "432 tokens of 18 documents; tokens by domain: code (144)" in text
    assert "seed 0, max_length 128" in text
    assert documents.HOSTILE not in text
    assert "<" not in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {4, 5}, "a domain's name broke its row"


def test_favourites_are_named_only_beyond_doubt(evaluated: dict[str, Any]) -> None:
    routing = json.loads(json.dumps(evaluated["routing"]))
    for bounds in routing["lift"].values():
        for rows in (bounds["low"], bounds["value"], bounds["high"]):
            rows[:] = [[0.5] * len(row) for row in rows]
    routing["lift"]["code"]["value"][0][2], routing["lift"]["code"]["low"][0][2] = 2.46, 1.2
    text = routing_section({**evaluated, "routing": routing})
    assert re.search(r"\| code \| expert 2 on layer 0, [\w.]+ \(2.5x\) \|", text)
    assert text.count("none beyond doubt") == 2


def test_a_part_that_was_not_run_is_left_out_and_nothing_at_all_is_refused(evaluated: dict[str, Any]) -> None:
    alone = {k: v for k, v in evaluated.items() if k != "ablation"}
    assert "shuffled gates" not in routing_section(alone).split("| domain |")[1].splitlines()[0]
    assert (
        "MaxVio" not in routing_section({k: v for k, v in evaluated.items() if k != "routing"}).split("| domain |")[1]
    )
    with pytest.raises(ConfigError, match="neither routing nor an ablation; run `molora eval routing`"):
        routing_section({k: v for k, v in alone.items() if k != "routing"})


def test_the_card_gets_the_section_once_and_a_new_one_in_its_place(evaluated: dict[str, Any], tmp_path: Path) -> None:
    before = card_of(save(tmp_path))
    written = write_card(of(evaluated, tmp_path), tmp_path)
    assert written == tmp_path / "README.md"
    first = card_of(tmp_path)
    assert first.startswith(before)
    assert (first.count(OPENING), first.count("## Routing")) == (1, 1)
    assert write_card(of({**evaluated, "ablation": documents.ablation(1)}, tmp_path), tmp_path) == written
    second = card_of(tmp_path)
    assert second.startswith(before)
    assert second != first
    assert second.count(OPENING) == 1
    assert sorted(os.listdir(tmp_path)) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_the_evaluation_of_other_weights_is_refused(evaluated: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "a")
    before = card_of(tmp_path / "a")
    with pytest.raises(ConfigError, match="sha256 .* the evaluation 'mixlora' is of 000000000000"):
        write_card(evaluated, tmp_path / "a")
    assert card_of(tmp_path / "a") == before
    (tmp_path / "no").mkdir()
    with pytest.raises(AdapterError, match="expected an adapter folder"):
        write_card(evaluated, tmp_path / "no")
    assert os.listdir(tmp_path / "no") == []


def test_a_save_keeps_the_section_of_the_same_weights_only(evaluated: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path)
    write_card(of(evaluated, tmp_path), tmp_path)
    told = card_of(tmp_path)
    save(tmp_path)
    assert card_of(tmp_path) == told
    save(tmp_path, card="another molora card")
    assert card_of(tmp_path) == told.replace("a molora adapter", "another molora card")
    save(tmp_path, small_tensors(0.5))
    assert card_of(tmp_path) == "a molora adapter"


def test_somebodys_own_readme_gets_the_section_and_stays(evaluated: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "README.md").write_bytes(b"my project, caf\xe9\n")
    write_card(of(evaluated, tmp_path), tmp_path)
    told = (tmp_path / "README.md").read_bytes()
    assert told.startswith(b"my project, caf\xe9\n\n" + OPENING.encode())
    save(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == told
    save(tmp_path, small_tensors(0.5))
    assert (tmp_path / "README.md").read_bytes() == b"my project, caf\xe9\n"


def test_comments_that_do_not_fit_together_are_left_alone(evaluated: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path)
    write_card(of(evaluated, tmp_path), tmp_path)
    for damage in (lambda t: t.replace("end of routing", "end"), lambda t: t + put("", "0" * 64, "twice")):
        text = damage(card_of(tmp_path))
        with pytest.raises(AdapterError, match="expected one section at most; take these lines out"):
            put(text, "0" * 64, "new")
    assert without(put("a card", "0" * 64, "text")) == "a card\n"


def test_a_link_in_place_of_the_card_is_not_followed(evaluated: dict[str, Any], tmp_path: Path) -> None:
    save(tmp_path / "a")
    (tmp_path / "a" / "README.md").unlink()
    (tmp_path / "secret").write_text("mine")
    (tmp_path / "a" / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterError, match="got a link"):
        write_card(of(evaluated, tmp_path / "a"), tmp_path / "a")
    assert (tmp_path / "secret").read_text() == "mine"
