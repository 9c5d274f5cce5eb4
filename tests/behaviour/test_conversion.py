"""A model after conversion: equal to its base at the start, training what it should, and its base again at the end."""

from __future__ import annotations

import inspect
import random

import numpy as np
import pytest
import torch

import molora
from molora.errors import ConfigError
from tests.support import behaviours, tiny
from tests.support.behaviours import matrix
from tests.support.tolerances import close

# The linears of each tiny model's feed-forward block, in the order they run: the tests may name them, the code may not.
FFN = {
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
    "bert": ("0.intermediate.dense", "1.intermediate.dense", "0.output.dense", "1.output.dense"),
    "vit": ("mlp.fc1", "mlp.fc2"),
}
SMALLEST = {torch.float32: "identity_ffn_fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def test_the_matrix_is_whole() -> None:
    assert len(molora.RECIPES) == 7, "a new recipe needs a small version in tests/support/tiny.py"
    assert set(tiny.SMALL) == set(molora.RECIPES)
    assert len(tiny.BUILDERS) == 8
    assert len(behaviours.PAIRS) + len(tiny.REFUSED) == 7 * 8
    assert set(behaviours.PAIRS).isdisjoint(tiny.REFUSED)
    assert len(behaviours.CAUSAL_PAIRS) == 7 * 5
    assert set(FFN) == set(tiny.BUILDERS)


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
            if recipe in behaviours.FFN_UNIT:
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
    assert trainable(model).keys() == expected_parameters(recipe, name).keys(), "the base's own weights are frozen"
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


def expected_parameters(recipe: str, name: str) -> dict[str, int]:
    """Trainable parameters by name and size, written down from the methods' own descriptions."""
    out: dict[str, int] = {}
    linears = {
        p: m
        for p, m in tiny.base_model(name).named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and any(c.isdigit() for c in p.split("."))
    }
    ffn = [p for p in linears if p.endswith(FFN[name]) and ".attention." not in p]
    lead = [p for p in ffn if p.endswith(FFN[name][0]) or ".intermediate." in p]
    for path, m in linears.items():
        d_in, d_out = (m.nx, m.nf) if hasattr(m, "nf") else (m.in_features, m.out_features)
        layer = next(int(c) for c in path.split(".") if c.isdigit())
        experts = {"lora": 1, "mixlora": 4, "mola": (2, 6)[layer], "llava_mole": 3}.get(recipe, 0)
        if recipe in ("mixlora", "llava_mole") and path not in ffn:
            experts = 1
        ranks = 16 if recipe == "smora" else 4 * experts
        if ranks:
            out |= {f"{path}.bank.lora_A": ranks * d_in, f"{path}.bank.lora_B": ranks * d_out}
        routed = {"mixlora": path in lead, "llava_mole": path in lead}.get(
            recipe, recipe in ("mola", "smora", "meteora")
        )
        if routed:
            out[f"{path}.router.weight"] = {"smora": 16, "meteora": 3}.get(recipe, experts) * d_in
            if recipe == "llava_mole":
                out[f"{path}.router.bias"] = experts
    if recipe == "xlora":
        sizes = {"0.weight": 32 * 16, "0.bias": 16, "1.weight": 16 * 3 * len(linears), "1.bias": 3 * len(linears)}
        out = {f"molora_router.layers.{n}": size for n, size in sizes.items()}
    return out


@matrix
def test_only_the_intended_parameters_train(recipe: str, name: str) -> None:
    model = behaviours.shared(recipe, name)
    expected = expected_parameters(recipe, name)
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
    same = [n for n in first if torch.equal(first[n], other[n]) and not n.endswith("lora_B")]
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
