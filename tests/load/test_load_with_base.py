"""`molora.from_pretrained` on other projects' folders: which base is loaded, as what class, and what goes where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

import molora
from molora.errors import AdapterError, ConfigError, TargetError
from tests.support import foreign_folders as write
from tests.support import tiny
from tests.support.tolerances import close


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.base_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def edited(folder: Path, **entries: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))
    return folder


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_a_folder_that_peft_wrote_with_a_task_or_the_class_alone(task: str | None, base: Path, tmp_path: Path) -> None:
    loaded = tf.LlamaForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(task_type=task, target_modules=["q_proj"], r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(loaded, config).eval()
    wrapped.save_pretrained(tmp_path / "lora")
    recorded = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert bool(recorded["auto_mapping"]) == (task is None)
    model = molora.from_pretrained(tmp_path / "lora", trainable=True, dtype=torch.float64)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.dtype == torch.float64
    assert model._molora.config.recipe == "lora"
    inputs = tiny.batch("llama")
    expected = tiny.output(wrapped, inputs)
    close(tiny.output(model.eval(), inputs).float(), expected, "same_math_fp32")


def test_a_classifier_gets_its_head_and_options_of_its_loader(tmp_path: Path) -> None:
    tiny.base_model("bert").save_pretrained(tmp_path / "base")
    folder = tiny.write_adapter(tmp_path / "lora", "bert", r=2, seed=1)
    edited(folder, base_model_name_or_path=str(tmp_path / "base"), task_type="SEQ_CLS")
    model = molora.from_pretrained(folder, num_labels=5, ignore_mismatched_sizes=True)
    assert type(model).__name__ == "BertForSequenceClassification"
    assert model.classifier.out_features == 5


def test_what_a_format_does_not_record_goes_to_load(base: Path, tmp_path: Path) -> None:
    folder = write.write(
        tmp_path / "mola", write.mola_config(base_model_name_or_path=str(base)), write.mola(), "adapter_model.bin"
    )
    with pytest.raises(ConfigError, match="does not record top_k"):
        molora.from_pretrained(folder, allow_pickle=True)
    model = molora.from_pretrained(folder, allow_pickle=True, top_k=1, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model._molora.config.placements[0].gate.top_k == 1
    again = molora.load(tf.LlamaForCausalLM.from_pretrained(base), folder, allow_pickle=True, top_k=1)
    assert [s.path for s in model._molora.sites] == [s.path for s in again._molora.sites]
    with pytest.raises(ConfigError, match="needs top_k"):
        molora.from_pretrained(folder, allow_pickle=True, top_k=1, temperature=2.0)


def test_a_molora_folder_refuses_them_before_the_base_is_loaded(tmp_path: Path) -> None:
    model = tiny.base_model("llama")
    model.config._name_or_path = "org/not-here"
    molora.convert(model, "lora", r=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"got \['top_k'\], but a molora folder records everything"):
        molora.from_pretrained(tmp_path, top_k=2)


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no name": ({"base_model_name_or_path": None}, AdapterError, "names no base model; load the base yourself"),
    "no task": ({"task_type": None}, AdapterError, "got task_type='None', which does not say the class of its base"),
    "an unknown task": ({"task_type": "PLAY"}, AdapterError, "expected one of CAUSAL_LM, SEQ_2_SEQ_LM"),
    "no class of transformers": (
        {"task_type": None, "auto_mapping": {"base_model_class": "os.system"}},
        TargetError,
        "its base class 'os.system' is not one of transformers",
    ),
    "something else of transformers": (
        {"task_type": None, "auto_mapping": {"base_model_class": "Trainer"}},
        TargetError,
        "its base class 'Trainer' is not one of transformers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_base_that_cannot_be_told_is_one_clear_error(case: str, base: Path, tmp_path: Path) -> None:
    entries, error, words = WRONG[case]
    folder = tiny.write_adapter(tmp_path / "lora", "llama", r=2, seed=1)
    edited(folder, **{"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", **entries})
    with pytest.raises(error, match=words):
        molora.from_pretrained(folder)


def test_formats_without_such_a_config_say_to_load_the_base(tmp_path: Path) -> None:
    write.write(tmp_path / "top_2", None, write.meteora(), "model.safetensors")
    with pytest.raises(AdapterError, match=r"names no base model; load the base yourself and call molora\.load"):
        molora.from_pretrained(tmp_path / "top_2", top_k=2, adapters=["a", "b", "c"])
