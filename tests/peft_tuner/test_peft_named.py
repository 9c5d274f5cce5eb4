"""Several named mixtures on one model: they switch by PEFT's and by transformers' methods, and never add up."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

import molora
from molora.errors import ConfigError
from molora.surgery.install import sites_of
from tests.support import behaviours, tiny
from tests.support.tolerances import close

RECIPES = list(tiny.RECIPES)
INPUTS = tiny.batch("llama")


def config(recipe: str, **more: Any) -> Any:
    return molora.peft_config(recipe, **behaviours.options(recipe, "llama", **more))


def values(model: Any, seed: int) -> None:
    """Arm the mixture in force, and only that."""
    named = model.named_mixtures
    model._modules["named_mixtures"] = None
    tiny.arm(model, seed)
    model._modules["named_mixtures"] = named


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each recipe, armed by its place among them."""
    folder = tmp_path_factory.mktemp("named")
    for seed, recipe in enumerate(RECIPES):
        alone(recipe, seed).save_pretrained(folder / recipe)
    return folder


def alone(recipe: str, seed: int) -> Any:
    model = molora.convert(tiny.base_model("llama"), recipe, **behaviours.options(recipe, "llama"))
    return tiny.arm(model, seed).eval()


@pytest.fixture(scope="module")
def outputs() -> dict[str, torch.Tensor]:
    """What each recipe computes as the only mixture of its model; and the base."""
    found = {recipe: tiny.output(alone(recipe, seed), INPUTS) for seed, recipe in enumerate(RECIPES)}
    return {**found, "": tiny.output(tiny.base_model("llama"), INPUTS)}


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def is_base(model: Any) -> bool:
    """Modules, tensors, flags and class of the base, and nothing else."""
    base = tiny.base_model("llama", trainable=True)
    own, wanted = model.state_dict(), base.state_dict()
    return (
        [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]
        and list(own) == list(wanted)
        and all(torch.equal(t, wanted[n]) for n, t in own.items())
        and [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in base.parameters()]
        and type(model) is type(base)
        and vars(model).keys() == vars(base).keys()
    )


def test_every_recipe_side_by_side(outputs: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Each computes what it computes alone, in any order; off, the base; saved, a folder of its own; then all gone."""
    model: Any = None
    for seed, recipe in enumerate(RECIPES):
        if model is None:
            model = get_peft_model(tiny.base_model("llama", trainable=True), config(recipe), adapter_name=recipe).eval()
        else:
            model.add_adapter(recipe, config(recipe))
        model.set_adapter(recipe)
        values(model.get_base_model(), seed)
    for recipe in [*RECIPES, *reversed(RECIPES)]:
        model.set_adapter(recipe)
        assert (model.active_adapter, model.active_adapters) == (recipe, [recipe])
        assert torch.equal(tiny.output(model, INPUTS), outputs[recipe])
        with model.disable_adapter():
            assert torch.equal(tiny.output(model, INPUTS), outputs[""])
        assert torch.equal(tiny.output(model, INPUTS), outputs[recipe])
    model.save_pretrained(tmp_path)
    for recipe in RECIPES:
        loaded = molora.load(tiny.base_model("llama"), tmp_path / recipe).eval()
        assert torch.equal(tiny.output(loaded, INPUTS), outputs[recipe])
    status = model.get_model_status()
    assert status.available_adapters == sorted(RECIPES)
    assert status.active_adapters == [RECIPES[0]]
    for recipe in RECIPES[1:]:
        model.delete_adapter(recipe)
    assert torch.equal(tiny.output(model, INPUTS), outputs[RECIPES[0]])
    assert is_base(model.unload())


def test_only_the_one_in_force_is_trained(folders: Path) -> None:
    model = PeftModel.from_pretrained(tiny.base_model("llama"), folders / "mola", "a", is_trainable=True)
    model.load_adapter(folders / "meteora", "b")
    for name, wanted in (("a", "mola"), ("b", "meteora"), ("a", "mola")):
        model.set_adapter(name)
        found = {n for n, p in model.get_base_model().named_parameters() if p.requires_grad}
        reference = molora.load(tiny.base_model("llama"), folders / wanted, trainable=True)
        assert found == {n for n, p in reference.named_parameters() if p.requires_grad}
    before = state_of(model)
    model.train()(**INPUTS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert not any("named_mixtures" in n for n in changed)
    with model.disable_adapter():
        pass
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= {n for n in changed if "select_bias" not in n}
    model.set_adapter("b", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())


def test_copies_switch_on_their_own(folders: Path, outputs: dict[str, torch.Tensor]) -> None:
    model = PeftModel.from_pretrained(tiny.base_model("llama"), folders / "xlora", "a")
    model.load_adapter(folders / "mixlora", "b")
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        copied.set_adapter("b")
        assert torch.equal(tiny.output(copied, INPUTS), outputs["mixlora"])
        assert torch.equal(tiny.output(model, INPUTS), outputs["xlora"])


def test_transformers_own_methods(folders: Path, outputs: dict[str, torch.Tensor]) -> None:
    """Without a PeftModel; what is loaded last is in force, since transformers' loader fills what is there."""
    model = tiny.base_model("llama")
    model.load_adapter(str(folders / "mola"), "a")
    model.load_adapter(str(folders / "xlora"), "b")
    assert model.active_adapters() == ["b"]
    assert torch.equal(tiny.output(model, INPUTS), outputs["xlora"])
    model.set_adapter("a")
    assert torch.equal(tiny.output(model, INPUTS), outputs["mola"])
    model.disable_adapters()
    assert torch.equal(tiny.output(model, INPUTS), outputs[""])
    model.enable_adapters()
    assert torch.equal(tiny.output(model, INPUTS), outputs["mola"])
    with pytest.warns(UserWarning, match="now it is b"):
        model.delete_adapter("a")
    assert torch.equal(tiny.output(model, INPUTS), outputs["xlora"])
    model.delete_adapter("b")
    assert torch.equal(tiny.output(model, INPUTS), outputs[""])
    model.add_adapter(config("lora"), "c")
    assert model.active_adapters() == ["c"]


def test_the_same_config_object_is_a_copy_another_config_a_fresh_mixture(outputs: dict[str, torch.Tensor]) -> None:
    given = config("mola")
    model = get_peft_model(tiny.base_model("llama"), given).eval()
    values(model.get_base_model(), RECIPES.index("mola"))
    model.add_adapter("ref", given)
    model.add_adapter("fresh", config("mola"))
    model.set_adapter("ref")
    assert torch.equal(tiny.output(model, INPUTS), outputs["mola"])
    model.set_adapter("fresh")
    assert torch.equal(tiny.output(model, INPUTS), outputs[""])


def test_experts_change_in_the_one_in_force(folders: Path, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(tiny.base_model("llama"), folders / "mixlora", is_trainable=True)
    model.load_adapter(folders / "mola", "b")
    counts = {p: m.site.num_experts for p, m in sites_of(model.get_base_model()).values()}
    model.add_expert()
    model.set_adapter("b")
    model.set_adapter("default")
    assert any(m.site.num_experts > counts[p] for p, m in sites_of(model.get_base_model()).values())
    assert all(p.requires_grad for n, p in model.named_parameters() if n.endswith("router.bias"))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path)
    assert torch.equal(tiny.output(loaded.eval(), INPUTS), tiny.output(model.eval(), INPUTS))


def test_one_expert_merges() -> None:
    model = get_peft_model(tiny.base_model("llama"), config("lora")).eval()
    values(model.get_base_model(), 0)
    output = tiny.output(model, INPUTS)
    merged = model.merge_and_unload()
    assert list(merged.state_dict()) == list(tiny.base_model("llama").state_dict())
    close(tiny.output(merged, INPUTS), output, "merged_fp32")


def refused_by_pefts_own_tuner() -> Any:
    return get_peft_model(tiny.base_model("llama"), LoraConfig(target_modules=["q_proj"]))


REFUSED: dict[str, tuple[Any, str]] = {
    "weighted": (lambda m, f: m.add_weighted_adapter(["default"], [1.0], "x"), "no sum of their parameters"),
    "merged": (lambda m, f: m.merge_and_unload(), "mixes experts by the token"),
    "merged in place": (lambda m, f: m.merge_adapter(), "depend on the token"),
    "rows of their own": (lambda m, f: m(**INPUTS, adapter_names=["default"] * 2), "one is in force at a time"),
    "several": (lambda m, f: m.base_model.set_adapter(["default", "b"]), "mixtures switch, never add"),
    "hotswap": (lambda m, f: hotswap_adapter(m, str(f / "mola"), "default"), "only supports LORA"),
    "a LoRA beside": (lambda m, f: m.add_adapter("x", LoraConfig()), "different peft types"),
    "mixed": (lambda m, f: get_peft_model(m.unload(), config("mola"), mixed=True), "PeftMixedModel"),
    "on a LoRA": (
        lambda m, f: get_peft_model(refused_by_pefts_own_tuner().get_base_model(), config("mola")),
        "carries another PEFT method",
    ),
    "on a converted model": (lambda m, f: get_peft_model(alone("mola", 0), config("mola")), "call unload\\(\\) first"),
    "a module's name": (lambda m, f: m.add_adapter("q_proj", config("mola")), "no number and no part of a path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_with_the_reason(case: str, folders: Path) -> None:
    model = get_peft_model(tiny.base_model("llama"), config("mola")).eval()
    attempt, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        attempt(model, folders)


def test_a_lora_of_pefts_inside_a_mixture_is_refused_when_it_runs() -> None:
    model = get_peft_model(tiny.base_model("llama"), config("mola")).get_base_model()
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="on this mixture's own layers"):
        model(**INPUTS)


def test_a_switch_that_fails_leaves_the_mixture_in_force(folders: Path, outputs: dict[str, torch.Tensor]) -> None:
    """A balance loss would be lost in re-entrant checkpointing, so that mixture does not go on a model that uses it."""
    model = PeftModel.from_pretrained(tiny.base_model("llama"), folders / "lora", "a")
    model.load_adapter(folders / "mola", "b")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ConfigError, match="use_reentrant"):
        model.set_adapter("b")
    assert torch.equal(tiny.output(model, INPUTS), outputs["lora"])
    model.gradient_checkpointing_disable()
    model.set_adapter("b")
    assert torch.equal(tiny.output(model, INPUTS), outputs["mola"])


def test_half_precision_bases_keep_their_adapters_in_float32(folders: Path) -> None:
    """transformers' loader casts what it loads to what the parameter is, not to the base's dtype."""
    wanted = tiny.output(molora.load(tiny.base_model("llama").bfloat16(), folders / "mixlora").eval(), INPUTS)
    model = tiny.base_model("llama").bfloat16()
    model.load_adapter(str(folders / "mixlora"))
    assert torch.equal(tiny.output(model, INPUTS), wanted)
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if ".bank." in n or ".router." in n)
