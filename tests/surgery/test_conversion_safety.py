"""A conversion that fails, a model that is copied, sent away, shared, cast or empty: nothing is half done."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import molora
from molora import model as gains
from molora.errors import AdapterError
from molora.layers.banks.plain import ExpertBank
from molora.layers.linear import MixtureLinear
from molora.layers.wrapper import Wrapper
from molora.surgery import build as making
from molora.surgery import install as surgery
from tests.support import behaviours, sizes, tiny
from tests.support.behaviours import each_recipe, matrix
from tests.support.tolerances import close
from tests.support.traits import traits


class BoomError(Exception):
    """Raised on purpose."""


def nth_call_raises(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, n: int) -> list[int]:
    """Make the n-th call (from 0) of ``owner.name`` raise; a list whose length is the number of calls."""
    original: Callable[..., Any] = getattr(owner, name)
    calls: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == n + 1:
            raise BoomError
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


@matrix
def test_a_failing_swap_changes_nothing(recipe: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every n: the wrappers stand ready, the n-th swap fails, and the model is as it was."""
    donor = behaviours.shared_fresh(recipe, name)
    model = tiny.base_model(name, trainable=True)
    before = behaviours.snapshot(model)
    built = making.build(model, donor._molora.config, donor._molora.sites)
    for n in range(len(built.modules)):
        with monkeypatch.context() as m:
            nth_call_raises(m, surgery, "_swap", n)
            with pytest.raises(BoomError):
                surgery.install(model, built)
        assert behaviours.snapshot(model) == before, f"swap {n} of {len(built.modules)}"
    gains.adopt(model, surgery.install(model, built))
    assert model.unload() is model
    assert behaviours.snapshot(model) == before


STEPS = [
    (ExpertBank, "reset_parameters", 3),
    (MixtureLinear, "__init__", 2),
    (ExpertBank, "set_expert", 4),
    (making, "_head", 0),
    (Wrapper, "own_parameters", 1),
    (gains, "fingerprint", 0),
    (gains, "rebind", 0),
    (gains, "mixture_class", 0),
]


@each_recipe
@pytest.mark.parametrize(("owner", "step", "n"), STEPS, ids=[s for _, s, _ in STEPS])
def test_a_failing_step_changes_nothing(
    recipe: str, name: str, owner: object, step: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.base_model(name, trainable=True)
    model.gradient_checkpointing_enable()
    before = behaviours.snapshot(model)
    calls = nth_call_raises(monkeypatch, owner, step, n)
    options = behaviours.options(recipe, name)
    if step == "set_expert" and not traits(recipe).imported:
        monkeypatch.undo()
        return  # no ready-made experts, nothing to copy
    with pytest.raises(BoomError):
        molora.convert(model, recipe, **options)
    assert len(calls) == n + 1
    assert behaviours.snapshot(model) == before
    monkeypatch.undo()
    molora.convert(model, recipe, **options)


def same_outputs(a: Any, b: Any, name: str) -> None:
    inputs = tiny.batch(name)
    assert torch.equal(tiny.output(a, inputs), tiny.output(b, inputs))
    with a.disable_adapter(), b.disable_adapter():
        assert torch.equal(tiny.output(a, inputs), tiny.output(b, inputs))


def storages(model: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}


@matrix
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_whole_and_apart(recipe: str, name: str, how: str) -> None:
    model = behaviours.shared(recipe, name)
    clone = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert type(clone) is type(model)
    same_outputs(clone, model, name)
    assert not storages(clone) & storages(model)
    inputs = tiny.batch(name)
    with clone.disable_adapter():
        off, on = tiny.output(clone, inputs), tiny.output(model, inputs)
    assert not torch.equal(off, on), "switching the copy off must not reach the original"
    expected = behaviours.train_step(copy.deepcopy(model), inputs)
    loss, grads = behaviours.train_step(clone, inputs)
    assert torch.equal(loss, expected[0])
    behaviours.assert_same(grads, expected[1])
    clone.unload().eval()
    assert torch.equal(tiny.output(clone, inputs), off)
    assert hasattr(model, "unload")


@matrix
def test_casts(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), tiny.batch(name)
    expected = tiny.output(model, inputs)
    wide = copy.deepcopy(model).to(torch.float64)
    wide_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    got = tiny.output(wide, wide_inputs)
    assert got.dtype == torch.float64
    close(got.float(), expected, "same_math_fp32")
    assert torch.equal(tiny.output(wide.to(torch.float32), inputs), expected)
    narrow = copy.deepcopy(model).bfloat16()
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    got = tiny.output(narrow, {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()})
    assert got.dtype == torch.bfloat16
    assert bool(torch.isfinite(got).all())


@each_recipe
def test_shared_memory(recipe: str, name: str) -> None:
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    expected = tiny.output(model, inputs)
    model.share_memory()
    assert all(p.is_shared() for p in model.parameters())
    assert torch.equal(tiny.output(model, inputs), expected)


@matrix
def test_meta_device(recipe: str, name: str) -> None:
    """Converted without storage, given storage, filled from a state dict: the same model."""
    donor = behaviours.shared(recipe, name)
    with torch.device("meta"):
        empty = tiny.BUILDERS[name]().eval()
    model = molora.convert(empty, recipe, **behaviours.options(recipe, name))
    ours, theirs = model.state_dict(), donor.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in theirs.items()}
    assert all(p.device.type == "meta" for p in model.parameters())
    assert model.get_nb_trainable_parameters() == donor.get_nb_trainable_parameters()
    base = tiny.base_model(name)
    model.to_empty(device="cpu")
    model.load_state_dict(theirs)
    buffers = dict(model.named_buffers())
    for path, b in base.named_buffers():  # the base's own (rotary frequencies) are the base's to fill
        if path not in theirs:
            buffers[path].copy_(b)
    same_outputs(model.eval(), donor, name)


class Shelf(nn.Module):
    """A linear that is not nn.Linear and keeps its weight in eight bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().max() / 127
        self.register_buffer("scale", scale)
        self.register_buffer("packed", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.packed.to(x.dtype) * self.scale.to(x.dtype)).t()


@each_recipe
def test_quantised_linears(recipe: str, name: str) -> None:
    model, inputs = tiny.base_model(name), tiny.batch(name)
    for path, m in list(model.named_modules()):
        if path.endswith("_proj"):
            setattr(model.get_submodule(path.rpartition(".")[0]), path.rpartition(".")[2], Shelf(m).eval())
    expected, before = tiny.output(model, inputs), behaviours.snapshot(model)
    tiny.arm(molora.convert(model, recipe, **behaviours.options(recipe, name)))
    assert len(list(behaviours.sites(model))) == len(sizes.placed(traits(model).config, name))
    assert (tiny.output(model, inputs) - expected).abs().max() > 0.1
    _, grads = behaviours.train_step(model, inputs)
    assert any(bool(g.any()) for g in grads.values())
    model.eval().unload()
    assert behaviours.snapshot(model) == before
    assert torch.equal(tiny.output(model, inputs), expected)


@each_recipe
@pytest.mark.parametrize("what", ["mlp", "self_attn.o_proj"])
def test_a_shared_module_is_wrapped_once(recipe: str, name: str, what: str) -> None:
    model, inputs = tiny.base_model(name), tiny.batch(name)
    layers, (parent, _, leaf) = model.model.layers, what.rpartition(".")
    setattr(layers[1].get_submodule(parent), leaf, layers[0].get_submodule(what))
    expected, before = tiny.output(model, inputs), behaviours.snapshot(model)
    options = behaviours.options(recipe, name)
    if traits(recipe).imported:  # these adapters are for a base whose layers are apart
        with pytest.raises(AdapterError, match="too many"):
            molora.convert(model, recipe, **options)
        assert behaviours.snapshot(model) == before
        return
    molora.convert(model, recipe, **options)
    assert layers[0].get_submodule(what) is layers[1].get_submodule(what)
    nested = [n for n, _ in behaviours.sites(model) if n.count("base_layer")]
    assert not nested
    tiny.arm(model)
    assert not torch.equal(tiny.output(model, inputs), expected)
    behaviours.train_step(model, inputs)
    model.eval().unload()
    assert behaviours.snapshot(model) == before
    assert torch.equal(tiny.output(model, inputs), expected)
