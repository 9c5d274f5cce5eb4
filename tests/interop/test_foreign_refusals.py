"""Foreign folders of every format, damaged alike or with too little said: one clear error, nothing changed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import molora
from molora.errors import AdapterError, ConfigError
from tests.support import foreign_folders as write
from tests.support.foreign_cases import FORMATS, edited, refused
from tests.support.tiny import GQA, base_model


def own(tensors: write.Tensors) -> str:
    """A tensor that belongs to the adapter, and not to a base that was saved with it."""
    return next(k for k in sorted(tensors) if any(x in k for x in ("lora_", "classifier", "inner", "last")))


def widen(tensors: write.Tensors) -> None:
    """The same matrices for another width of the inputs, everywhere."""
    for k, t in tensors.items():
        if t.ndim == 2:
            tensors[k] = torch.cat([t, t[:, :1]], 1)


DAMAGES: dict[str, tuple[Callable[[write.Tensors], object], str]] = {
    "nan": (lambda t: t[own(t)].view(-1)[:1].fill_(math.nan), "holds NaN"),
    "a_tensor_is_missing": (lambda t: t.pop(own(t)), "missing|alone|no weight matrix|have a bias|not whole"),
    "one_too_many": (lambda t: t.update({"x.lora_stranger": torch.ones(2, 2)}), "x.lora_stranger"),
    "whole_numbers": (lambda t: t.update({own(t): t[own(t)].long()}), "int64|floating"),
    "other_widths": (widen, "another base|expected|linears of|got shape"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", FORMATS)
def test_damaged_weights(form: str, damage: str, tmp_path: Path):
    make, name, more = FORMATS[form]
    make(tmp_path / "x")
    edit, words = DAMAGES[damage]
    edited(tmp_path / "x" / name, edit)
    refused(tmp_path / "x", AdapterError, words, **more)


@pytest.mark.parametrize("form", FORMATS)
def test_torn_lost_or_exchanged_files(form: str, tmp_path: Path):
    make, name, more = FORMATS[form]
    make(tmp_path / "x")
    path = tmp_path / "x" / name
    raw = path.read_bytes()
    path.write_bytes(raw[:-3])
    refused(tmp_path / "x", AdapterError, f"{name}.*whole safetensors file", **more)
    path.write_bytes(raw)
    path.rename(tmp_path / "elsewhere")
    refused(tmp_path / "x", AdapterError, "there is no|neither|expected an adapter folder", **more)
    path.symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "x", AdapterError, "got a link|full model", **more)


@pytest.mark.parametrize("form", FORMATS)
def test_another_base(form: str, tmp_path: Path):
    make, _, more = FORMATS[form]
    make(tmp_path / "x")
    narrow = tf.LlamaForCausalLM(tf.LlamaConfig(**{**GQA, "hidden_size": 16, "num_attention_heads": 2, "head_dim": 8}))
    for other in (narrow, base_model("gpt2")):
        refused(tmp_path / "x", AdapterError, "base|expected", model=other, **more)


@pytest.mark.parametrize("form", FORMATS)
def test_keywords_that_nobody_needs(form: str, tmp_path: Path):
    make, _, more = FORMATS[form]
    make(tmp_path / "x")
    refused(tmp_path / "x", ConfigError, r"\['topk'\], but .* needs", **more, topk=2)
    refused(tmp_path / "x", ConfigError, "already carries", model=molora.convert(base_model("llama"), "lora"), **more)


@pytest.mark.parametrize(("form", "name"), [(f, n) for f, (_, _, more) in FORMATS.items() for n in more])
def test_what_is_not_recorded_is_asked_for(form: str, name: str, tmp_path: Path):
    make, _, more = FORMATS[form]
    make(tmp_path / "x")
    rest = {k: v for k, v in more.items() if k != name}
    asks = rf"does not record {name}: .*\. Give it: molora\.load\(base, folder, {name}="
    refused(tmp_path / "x", ConfigError, asks, **rest)
    refused(tmp_path / "x", ConfigError, f"{name}: got [{{]1[}}], expected", **rest, **{name: {1}})


@pytest.mark.parametrize("form", ["peft_lora", "peft_xlora", "xlora", "mixlora", "mola"])
def test_a_pickle_without_permission(form: str, tmp_path: Path):
    make, name, more = FORMATS[form]
    make(tmp_path / "x")
    path = tmp_path / "x" / name
    tensors = load_file(path)
    path.unlink()
    pickled = path.with_suffix(".pt" if form == "xlora" else ".bin")
    torch.save(tensors, pickled)
    refused(tmp_path / "x", AdapterError, "pickle.*allow_pickle=True", **more)
    torch.save({**tensors, "step": 3}, pickled)
    refused(tmp_path / "x", AdapterError, "named tensors and nothing else", allow_pickle=True, **more)
    pickled.write_bytes(pickled.read_bytes()[:-100])
    refused(tmp_path / "x", AdapterError, "expected a torch.save file", allow_pickle=True, **more)


NOT_IN_THE_FILE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "on_meta": lambda t: t.to("meta"),
    "a_terabyte_of_one_number": lambda t: torch.zeros(1).expand(1 << 38),
    "nested": lambda t: torch.nested.nested_tensor([t[0], t[1]]),
    "eight_bits": lambda t: t.to(torch.float8_e4m3fn),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("case", NOT_IN_THE_FILE)
@pytest.mark.parametrize("form", ["peft_lora", "mola"])
def test_a_pickle_of_tensors_whose_numbers_it_does_not_hold(form: str, case: str, tmp_path: Path):
    make, name, more = FORMATS[form]
    make(tmp_path / "x")
    path = tmp_path / "x" / name
    tensors = load_file(path)
    tensors[own(tensors)] = NOT_IN_THE_FILE[case](tensors[own(tensors)])
    path.unlink()
    torch.save(tensors, path.with_suffix(".bin"))
    refused(tmp_path / "x", AdapterError, "all its numbers in the file", allow_pickle=True, **more)


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_beyond_the_dtype_that_computes(form: str, tmp_path: Path):
    make, name, more = FORMATS[form]
    make(tmp_path / "x")
    edited(tmp_path / "x" / name, lambda t: t.update({own(t): t[own(t)].double() * 1e300}))
    refused(tmp_path / "x", AdapterError, "float64 values too large for torch.float32", **more)


@pytest.mark.parametrize("form", ["xlora", "peft_xlora"])
def test_names_of_adapters_that_are_no_text(form: str, tmp_path: Path):
    FORMATS[form][0](tmp_path / "x")
    refused(tmp_path / "x", ConfigError, r"got 1 \(1\)", adapters={1: "x"})
    refused(tmp_path / "x", ConfigError, "expected .name: PEFT LoRA folder", adapters={1: "x", 2: "y"})


BAD_ADAPTERS = (["a", "b"], ["a", "b", "b"], [["a"], ["b"], ["c"]], {"a": "x", "b": "y", "c": 3}, {"a": "x"})


@pytest.mark.parametrize("given", BAD_ADAPTERS, ids=str)
def test_names_that_are_not_one_an_expert(given: object, tmp_path: Path):
    make, _, more = FORMATS["meteora"]
    make(tmp_path / "x")
    refused(tmp_path / "x", ConfigError, "expected 3 names", **{**more, "adapters": given})


def test_folders_of_another_rank_or_of_none(tmp_path: Path):
    make, _, more = FORMATS["meteora"]
    make(tmp_path / "x")
    folders = write.loras(tmp_path, {"a": 2, "b": 4, "c": 2})
    rest = {"top_k": more["top_k"]}
    refused(tmp_path / "x", AdapterError, "got rank 4, expected rank 2", **rest, adapters=folders)
    refused(tmp_path / "x", AdapterError, "expected a PEFT LoRA folder", **rest, adapters={**folders, "b": tmp_path})
    refused(tmp_path / "x", ConfigError, r"got \['lora_alpha'\]", **more | {"adapters": {**folders, "b": folders["a"]}})
    refused(tmp_path / "x", ConfigError, "(?s)x with .*top_k: got 9 with 3", **{**more, "top_k": 9})
    refused(tmp_path / "x", ConfigError, "lora_alpha: got 0, expected a value above 0", **{**more, "lora_alpha": 0})
