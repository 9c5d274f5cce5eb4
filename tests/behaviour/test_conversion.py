"""A model after conversion: equal to its base at the start, training what it should, and its base again at the end."""

from __future__ import annotations

import inspect
import random

import numpy as np
import pytest
import torch

import molora
from molora.errors import ConfigError
from tests.support import behaviours, sizes, tiny
from tests.support.behaviours import matrix
from tests.support.tolerances import close
from tests.support.traits import traits

SMALLEST = {torch.float32: "identity_ffn_fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def test_the_matrix_is_whole() -> None:
    recipes = len(molora.RECIPES)
    assert set(tiny.SMALL) == set(molora.RECIPES)
    assert len(tiny.BUILDERS) == 8
    assert len(behaviours.PAIRS) + len(tiny.REFUSED) == recipes * 8
    assert set(behaviours.PAIRS).isdisjoint(tiny.REFUSED)
    assert len(behaviours.CAUSAL_PAIRS) == recipes * 5
    assert set(sizes.FFN) == set(tiny.BUILDERS)


@pytest.mark.parametrize(("recipe", "name"), list(tiny.REFUSED))
def test_refused_pairs_change_nothing(recipe: str, name: str) -> None:
    model = tiny.base_model(name, trainable=True)
    before = behaviours.snapshot(model)
    with pytest.raises(tiny.REFUSED[recipe, name], match="two"):
        molora.convert(model, recipe, **behaviours.options(recipe, name))
    assert behaviours.snapshot(model) == before


@matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_zero_init_is_identity(recipe: str, name: str, dtype: torch.dtype) -> None:
    if not traits(recipe).is_base_at_zero:
        pytest.skip("the weights of its blocks do not sum to 1, so it differs from the base from the start")
    base = tiny.base_model(name).to(dtype)
    model = behaviours.fresh(recipe, name, dtype)
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tiny.batch(name).items()}
    for train in (False, True):
        with torch.no_grad():
            expected = base.train(train)(**inputs, output_hidden_states=True)
            got = model.train(train)(**inputs, output_hidden_states=True)
        states = "decoder_hidden_states" if name == "t5" else "hidden_states"
        pairs = [(got.logits, expected.logits), *zip(got[states], expected[states], strict=True)]
        if not train:  # a training loss has the balance loss in it
            pairs.append((got.loss, expected.loss))
        for ours, theirs in pairs:
            assert ours.dtype == theirs.dtype
            if traits(recipe).mixes_blocks:
                close(ours, theirs, SMALLEST[dtype])
            else:
                assert torch.equal(ours, theirs)


@matrix
def test_unload_brings_everything_back(recipe: str, name: str) -> None:
    model, inputs = tiny.base_model(name, trainable=True), tiny.batch(name)
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    list(model.modules())[7].train()
    before, output = behaviours.snapshot(model), tiny.output(model, inputs)
    frozen = tiny.output(tiny.base_model(name), inputs)
    converted = molora.convert(model, recipe, **behaviours.options(recipe, name))
    assert converted is model
    assert isinstance(model, type(tiny.base_model(name)))
    expected = sizes.trained(traits(model).config, name)
    assert trainable(model).keys() == expected.keys(), "the base's own weights are frozen"
    tiny.arm(model)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model, inputs), frozen)
    assert not torch.equal(tiny.output(model, inputs), frozen)
    with pytest.raises(ConfigError, match="unload"):
        molora.convert(model, "lora")
    assert model.unload() is model
    assert behaviours.snapshot(model) == before
    assert torch.equal(tiny.output(model, inputs), output)
    assert not hasattr(model, "unload"), "the base has no such method: a second unload is the caller's mistake"


@matrix
def test_training_leaves_the_base_alone(recipe: str, name: str) -> None:
    model, before = behaviours.armed(recipe, name), behaviours.digest(tiny.base_model(name).state_dict())
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(5):
        optimizer.zero_grad()
        behaviours.loss_of(model.train(), tiny.batch(name, seed=step)).backward()
        optimizer.step()
    still = [n for n, p in model.named_parameters() if p.requires_grad and torch.equal(p, start[n])]
    assert not still, f"did not train: {still}"
    model.unload().eval()
    assert behaviours.digest(model.state_dict()) == before


@matrix
def test_only_the_intended_parameters_train(recipe: str, name: str) -> None:
    model = behaviours.shared(recipe, name)
    expected = sizes.trained(traits(model).config, name)
    assert {n: p.numel() for n, p in model.named_parameters() if p.requires_grad} == expected
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == sum(expected.values())
    assert total == sum(p.numel() for p in model.parameters())


def trainable(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


@matrix
def test_initial_weights_depend_on_the_seed_alone(recipe: str, name: str) -> None:
    first = trainable(behaviours.shared_fresh(recipe, name))
    model = tiny.base_model(name)
    for m in model.modules():  # the same modules in another order; layers run in the order of their numbers
        for child in [] if next(iter(m._modules), "0").isdigit() else reversed(list(m._modules)):
            m._modules[child] = m._modules.pop(child)
    states = torch.manual_seed(6).get_state(), random.getstate(), np.random.get_state()[1].tolist()
    molora.convert(model, recipe, **behaviours.options(recipe, name))
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    modules = [list(dict(m.named_modules())) for m in (model, behaviours.shared_fresh(recipe, name))]
    assert modules[0] != modules[1]
    assert set(modules[0]) == set(modules[1])
    behaviours.assert_same(first, trainable(model))


@behaviours.each_recipe
def test_another_seed_gives_other_weights(recipe: str, name: str) -> None:
    first = trainable(behaviours.shared_fresh(recipe, name))
    other = trainable(molora.convert(tiny.base_model(name), recipe, seed=1, **behaviours.options(recipe, name)))
    drawn = [n for n in first if not n.endswith("lora_B") and not (traits(recipe).imported and ".bank." in n)]
    same = [n for n in drawn if torch.equal(first[n], other[n])]
    assert not same


@matrix
def test_the_base_interface_still_works(recipe: str, name: str, tmp_path: object) -> None:
    base, model = tiny.base_model(name), behaviours.armed(recipe, name)
    ours = inspect.signature(type(model).forward).parameters
    theirs = inspect.signature(type(base).forward).parameters
    assert [p for p in ours if p != "task_ids"] == list(theirs)
    assert "task_ids" in ours
    assert type(model).__name__ == type(base).__name__
    assert type(model).__module__ == type(base).__module__
    assert model.config.to_dict() == base.config.to_dict()
    assert model.num_parameters() > base.num_parameters()
    inputs = tiny.batch(name, labels=False)
    if model.can_generate():
        assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    outputs = model(**tiny.batch(name), return_dict=False)
    assert isinstance(outputs, tuple)
    assert outputs[0].ndim == 0
    model.save_pretrained(tmp_path)


@matrix
def test_positional_arguments_mean_the_same(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), tiny.batch(name, labels=False)
    if name == "t5":
        inputs |= {"decoder_input_ids": inputs["input_ids"][:, :3]}
    names = [n for n in inspect.signature(type(tiny.base_model(name)).forward).parameters if n != "self"]
    last = max(names.index(n) for n in inputs)
    by_place = [inputs.get(n) for n in names[: last + 1]]
    with torch.no_grad():
        assert torch.equal(model(*by_place).logits, model(**inputs).logits)
