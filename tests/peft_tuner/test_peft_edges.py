"""The edges of the PEFT tuner: names, flags, casts, embeddings that were resized, experts whose B is fixed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

import molora
from molora.errors import CheckpointError, ConfigError
from molora.surgery.install import sites_of
from tests.support import behaviours, tiny, zero3_uses

INPUTS = tiny.batch("llama")
ODD = ("a b", "a/b", "ü", "user@x", "lora_", "default_2")
BAD = ("", "a.b", "7", "weight", "bank", "wrappers", "lora_A", "molora_router", "training", "_modules", "keys", "mlp")


def config(recipe: str, **more: Any) -> Any:
    return molora.peft_config(recipe, **behaviours.options(recipe, "llama", **more))


def trainable(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_names_are_kept_as_they_are_or_refused(tmp_path: Path) -> None:
    """Also the first name of a model, when the parts of the mixtures that would clash with it are still to come."""
    for bad in BAD:
        with pytest.raises(ConfigError, match="adapter name"):
            get_peft_model(tiny.base_model("llama"), config("xlora"), adapter_name=bad)
    model = get_peft_model(tiny.base_model("llama"), config("mola"), adapter_name=ODD[0])
    for name in ODD[1:]:
        model.add_adapter(name, config("xlora"))
    for bad in BAD:
        with pytest.raises(ConfigError, match="adapter name"):
            model.add_adapter(bad, config("mola"))
    assert list(model.peft_config) == list(ODD)
    tiny.arm(model.get_base_model())
    model.save_pretrained(tmp_path)
    for name in ODD:
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / name, adapter_name=name)
        assert torch.equal(tiny.output(loaded.eval(), INPUTS), tiny.output(model.eval(), INPUTS))


def test_experts_whose_b_is_fixed_stay_so(tmp_path: Path) -> None:
    """MiCA trains A alone: in PEFT's model, after switching, and loaded to be trained on."""
    options = {"r": 2, "num_experts": 3, "init_lora_weights": "mica"}
    wanted = trainable(molora.convert(tiny.base_model("llama"), "mola", **options))
    model = get_peft_model(tiny.base_model("llama"), molora.peft_config("mola", **options), adapter_name="a")
    model.add_adapter("b", config("mola"))
    for name in ("b", "a"):
        model.set_adapter(name)
    assert wanted == trainable(model.get_base_model())
    assert not any(n.endswith("lora_B") for n in wanted)
    with pytest.raises(ConfigError, match="B is not trained"):
        model.add_expert()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / "a", is_trainable=True)
    again.prune_experts(e for e in [1])
    assert trainable(again.get_base_model()) == wanted
    assert {m.site.num_experts for _, m in sites_of(again.get_base_model()).values()} == {2}


def test_the_inner_model_may_be_unloaded_first() -> None:
    model = get_peft_model(tiny.base_model("llama", trainable=True), config("mola"), adapter_name="a")
    model.add_adapter("b", config("lora"))
    model.get_base_model().unload()
    base = model.unload()
    assert vars(base).keys() == vars(tiny.base_model("llama")).keys()
    assert [n for n, _ in base.named_modules()] == [n for n, _ in tiny.base_model("llama").named_modules()]
    assert all(p.requires_grad for p in base.parameters())


def test_a_switch_that_fails_leaves_a_frozen_mixture_frozen() -> None:
    model = get_peft_model(tiny.base_model("llama"), config("lora"), adapter_name="a")
    model.add_adapter("b", config("mola"))
    model.set_adapter("a", inference_mode=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.set_adapter("b")
    assert trainable(model) == set()
    assert model.active_adapters == ["a"]


def test_a_cast_reaches_all_and_leaves_no_second_copy() -> None:
    """The frozen experts that the tuner holds on to for ZeRO-3 are those of the modules, also after a cast."""
    model = get_peft_model(tiny.base_model("llama"), config("meteora"), adapter_name="a")
    model.add_adapter("b", config("xlora"))
    model.double()
    named = model.get_base_model().named_mixtures
    for name in ("a", "b"):
        own, kept = named.tensors(name), named.frozen[name]
        assert kept
        assert {t.dtype for t in own.values()} == {torch.float64}
        assert all(t.data_ptr() == own[n].data_ptr() for n, t in kept.items())


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resized")
    zero3_uses.model_folder(folder)
    return folder / "llama"


def resized(where: Path) -> Any:
    """The tiny Llama with six more tokens, the same rows every time."""
    model = tf.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(70)
    return model


def test_embeddings_that_were_resized_are_saved_with_the_mixture_that_trains_them(where: Path, tmp_path: Path) -> None:
    """PEFT adds the embeddings of a base that was resized to what it saves; the mixture's copies are what counts."""
    model = get_peft_model(resized(where), config("mola", modules_to_save=["embed_tokens", "lm_head"]))
    tiny.arm(model.get_base_model())
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".trained." in n:
                p.add_(0.1)
    model.save_pretrained(tmp_path / "whole")
    for loaded in (
        PeftModel.from_pretrained(resized(where), tmp_path / "whole"),
        molora.load(resized(where), tmp_path / "whole"),
    ):
        assert torch.equal(tiny.output(loaded.eval(), INPUTS), tiny.output(model.eval(), INPUTS))
    frozen = get_peft_model(resized(where), config("mola"))
    with pytest.raises(CheckpointError, match=r"name them in modules_to_save, or pass save_embedding_layers=False"):
        frozen.save_pretrained(tmp_path / "frozen")
    frozen.save_pretrained(tmp_path / "frozen", save_embedding_layers=False)
    assert isinstance(PeftModel.from_pretrained(resized(where), tmp_path / "frozen"), PeftModel)
