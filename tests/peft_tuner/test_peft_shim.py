"""``get_peft_model`` and the four loaders of its folder: what ``convert`` and ``load`` make, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import AutoPeftModel, AutoPeftModelForCausalLM, PeftModel, get_peft_model

import molora
from molora.errors import AdapterError, CheckpointError, ConfigError
from molora.surgery.install import sites_of
from tests.support import behaviours, tiny, zero3_uses
from tests.support.places import ROOT
from tests.support.training_runs import SETTINGS, data
from tests.support.traits import traits

RECIPES = list(tiny.RECIPES)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    zero3_uses.model_folder(folder)
    return folder


def base(where: Path) -> Any:
    """The tiny Llama out of a folder, so that adapters can name it."""
    return tf.AutoModelForCausalLM.from_pretrained(where / "llama", dtype=torch.float32)


def peft_model(where: Path, recipe: str, seed: int = 0, task_type: str | None = None) -> Any:
    """An armed mixture in a PeftModel, in eval mode."""
    options = behaviours.options(recipe, "llama")
    model = get_peft_model(base(where), molora.peft_config(recipe, seed=seed, task_type=task_type, **options))
    tiny.arm(model.get_base_model())
    return model.eval()


def converted(where: Path, recipe: str, seed: int = 0) -> Any:
    return tiny.arm(molora.convert(base(where), recipe, seed=seed, **behaviours.options(recipe, "llama"))).eval()


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_computes_generates_and_learns_as_the_converted_model(recipe: str, where: Path) -> None:
    """Outputs, tokens, loss with the balance loss in it, and every gradient."""
    model, wanted, inputs = peft_model(where, recipe, 3), converted(where, recipe, 3), tiny.batch("llama")
    assert torch.equal(tiny.output(model, inputs), tiny.output(wanted, inputs))
    ids = inputs["input_ids"]
    texts = [m.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for m in (model, wanted)]
    assert torch.equal(*texts)
    labelled = inputs | ({"task_ids": torch.tensor([0, 2])} if traits(recipe).needs_tasks else {})
    found = []
    for m in (model, wanted):
        torch.manual_seed(0)
        outputs = m.train()(**labelled)
        outputs.loss.backward()
        found.append((outputs.loss, outputs.get("aux_loss")))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    own = dict(model.get_base_model().named_parameters())
    for name, p in wanted.named_parameters():
        assert p.requires_grad == own[name].requires_grad, name
        assert p.grad is None if own[name].grad is None else torch.equal(p.grad, own[name].grad), name
    assert model.get_nb_trainable_parameters() == wanted.get_nb_trainable_parameters()


@pytest.mark.parametrize("recipe", RECIPES)
def test_four_loaders_read_what_peft_saves_and_what_molora_saves(recipe: str, where: Path, tmp_path: Path) -> None:
    """The weights are the same bytes; every loader gives the model that was saved, frozen and bit by bit."""
    model, inputs = peft_model(where, recipe), tiny.batch("llama")
    output = tiny.output(model, inputs)
    model.save_pretrained(tmp_path / "peft")
    converted(where, recipe).save_pretrained(tmp_path / "molora")
    assert sorted(os.listdir(tmp_path / "peft")) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    weights = [(tmp_path / kind / "adapter_model.safetensors").read_bytes() for kind in ("peft", "molora")]
    assert weights[0] == weights[1]
    for kind in ("peft", "molora"):
        folder = tmp_path / kind
        for loaded in (
            PeftModel.from_pretrained(base(where), folder),
            AutoPeftModel.from_pretrained(folder),
            tf.AutoModelForCausalLM.from_pretrained(folder),
            molora.load(base(where), folder),
        ):
            assert torch.equal(tiny.output(loaded.eval(), inputs), output)
            assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_a_task_type_gives_pefts_class_for_it(recipe: str, where: Path, tmp_path: Path) -> None:
    model, inputs = peft_model(where, recipe, task_type="CAUSAL_LM"), tiny.batch("llama")
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert torch.equal(tiny.output(model, inputs), tiny.output(converted(where, recipe), inputs))
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path, is_trainable=True)
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    assert torch.equal(tiny.output(loaded.eval(), inputs), tiny.output(model, inputs))
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained


@pytest.mark.parametrize("name", ["phi3", "gpt2", "bert"])
@pytest.mark.parametrize("recipe", ["mixlora", "llava_mole"])
def test_other_models(recipe: str, name: str, tmp_path: Path) -> None:
    """Blocks that run once per expert, linears stored transposed, and a classifier whose head is trained whole."""
    options = {"modules_to_save": ["classifier"]} if name == "bert" else {}
    config = molora.peft_config(recipe, **behaviours.options(recipe, name), **options)
    model = get_peft_model(tiny.base_model(name), config)
    tiny.arm(model.get_base_model())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".trained." in n:
                p.add_(0.5)
    output = tiny.output(model.eval(), tiny.batch(name))
    model.save_pretrained(tmp_path)
    for loaded in (PeftModel.from_pretrained(tiny.base_model(name), tmp_path), tiny.base_model(name)):
        if not isinstance(loaded, PeftModel):
            loaded.load_adapter(str(tmp_path))
        assert torch.equal(tiny.output(loaded.eval(), tiny.batch(name)), output)


def test_resuming_by_transformers_trainer(where: Path, tmp_path: Path) -> None:
    """Four steps, or two and two more from the checkpoint: the same weights; the second run starts from other ones."""

    def run(folder: Path, resume: Any = None, seed: int = 0, **more: Any) -> Any:
        model = get_peft_model(base(where), molora.peft_config("mola", r=4, seed=seed))
        steps = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        settings = tf.TrainingArguments(output_dir=str(folder), **{**SETTINGS, **steps, **more})
        it = tf.Trainer(model, settings, train_dataset=data(model.get_base_model()))
        it.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "a")
    again = run(tmp_path / "b", resume=str(tmp_path / "a" / "checkpoint-2"), seed=9)
    own = dict(again.named_parameters())
    assert all(torch.equal(p, own[n]) for n, p in whole.named_parameters())
    assert not any(f.startswith("model") for f in os.listdir(tmp_path / "a" / "checkpoint-4"))


def test_the_digest_holds_on_every_way(where: Path, tmp_path: Path) -> None:
    """One bit of the weights changed, and the config edited: no loader takes it."""
    peft_model(where, "mola").save_pretrained(tmp_path)
    path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
    with pytest.raises(AdapterError, match="not those that its config was saved with"):
        PeftModel.from_pretrained(base(where), tmp_path)
    with pytest.raises(AdapterError, match="sha256"):
        molora.load(base(where), tmp_path)
    loaded = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path
    )  # reads config and weights apart, so it shows at first use
    with pytest.raises(AdapterError, match="not those that its config was saved with"):
        loaded(**tiny.batch("llama"))
    path.write_bytes(whole)
    config.write_text(config.read_text().replace('"top_k": 2', '"top_k": 1', 1))
    for load in (
        lambda: PeftModel.from_pretrained(base(where), tmp_path),
        lambda: AutoPeftModel.from_pretrained(tmp_path),
    ):
        with pytest.raises(AdapterError, match="checksum"):
            load()


def test_what_cannot_be_saved_or_loaded_says_why(where: Path, tmp_path: Path) -> None:
    model = peft_model(where, "mola")
    with pytest.raises(CheckpointError, match="safe_serialization=True"):
        model.save_pretrained(tmp_path / "pickle", safe_serialization=False)
    with pytest.raises(CheckpointError, match="not used for a model yet"):
        molora.peft_config("mola").save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(AdapterError, match="made for another base"):
        PeftModel.from_pretrained(tiny.base_model("qwen3"), tmp_path / "whole")
    with pytest.raises(ConfigError, match="low_cpu_mem_usage"):
        PeftModel.from_pretrained(base(where), tmp_path / "whole", low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match="keeps from the model; leave task_type out"):
        molora.peft_config("meteora", task_type="CAUSAL_LM", **behaviours.options("meteora", "llama"))
    with torch.no_grad():
        next(m.bank for _, m in sites_of(model.get_base_model()).values()).lora_B[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="NaN"):
        model.save_pretrained(tmp_path / "nan")
    assert not (tmp_path / "nan" / "adapter_model.safetensors").exists()


def test_a_failed_conversion_leaves_the_model_as_it_was() -> None:
    plain = tiny.base_model("llama")
    with pytest.raises(molora.errors.TargetError):
        get_peft_model(plain, molora.peft_config("mola", target_modules=["nothing"]))
    assert [n for n, _ in plain.named_modules()] == [n for n, _ in tiny.base_model("llama").named_modules()]
    assert isinstance(molora.convert(plain, "mola"), tf.LlamaForCausalLM)


LATE = """
import sys, importlib.util, transformers
import molora
assert "peft" not in sys.modules, "import molora imports PEFT"
assert importlib.util.find_spec("peft") is not None
import peft
print(type(peft.PeftConfig.from_pretrained({folder!r})).__name__, peft.__spec__.loader.__class__.__name__)
print([type(f).__name__ for f in sys.meta_path].count("_AfterImport"))
print(torch_ok(transformers.AutoModelForCausalLM.from_pretrained({folder!r})))
"""
MISSING = """
import sys
sys.modules["peft"] = None
import molora
try:
    molora.peft_config("mola")
except molora.errors.ConfigError as e:
    print(e)
"""


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "def torch_ok(m): return type(m._molora).__name__\n" + code],
        capture_output=True, text=True, timeout=120, check=False, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_molora_waits_for_peft(where: Path, tmp_path: Path) -> None:
    """It does not import PEFT; whoever does has the tuner registered, and finds PEFT's loader as it was."""
    peft_model(where, "mola").save_pretrained(tmp_path)
    printed = python(LATE.format(folder=str(tmp_path))).split("\n")
    assert printed[:3] == ["MixtureConfig SourceFileLoader", "0", "Mixture"]


def test_without_peft_the_extra_is_named() -> None:
    assert "pip install 'molora[peft]'" in python(MISSING)


def test_the_config_of_the_folder_is_moloras(where: Path, tmp_path: Path) -> None:
    """None of PEFT's own fields is in it, but for the task type."""
    peft_model(where, "mola", task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["molora_format"]) == ("MOLORA", "CAUSAL_LM", 1)
    assert config["base_model_name_or_path"] == str(where / "llama")
    assert "inference_mode" not in config
