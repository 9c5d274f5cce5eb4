"""``torch.compile`` without a graph break: eval, training with balance losses, the off switch."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

import molora
from tests.support import behaviours, tiny
from tests.support.behaviours import each_recipe
from tests.support.tolerances import close
from tests.support.traits import traits

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    logging.getLogger("torch.__trace").propagate = False  # thousands of empty lines in a failure's report
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def one_layer(recipe: str, name: str) -> Any:
    """Half the graph to trace; the sites of the other layer are gone with it."""
    model = behaviours.armed(recipe, name)
    del model.model.layers[1]
    return model


def no_breaks() -> None:
    assert not counters["graph_break"], dict(counters["graph_break"])


@each_recipe
def test_eval(recipe: str, name: str) -> None:
    """One graph; switching the adapter off and on again, and recording, are seen by the compiled model."""
    model, inputs = one_layer(recipe, name), tiny.batch(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    on = tiny.output(model, inputs)
    with model.disable_adapter():
        off = tiny.output(model, inputs)
    assert not torch.equal(on, off)
    for _ in range(2):
        assert torch.equal(tiny.output(compiled, inputs), on)
        with model.disable_adapter():
            assert torch.equal(tiny.output(compiled, inputs), off)
    no_breaks()
    other = tiny.batch(name, rows=3, length=6)
    close(tiny.output(compiled, other), tiny.output(model, other), "same_math_fp32")
    no_breaks()


def step(model: Any, inputs: dict[str, Tensor], forward: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.train()
    model.zero_grad(set_to_none=True)
    task = {"task_ids": torch.tensor([0, 2])} if traits(model).needs_tasks else {}
    loss = forward(**inputs, **task, use_cache=False).loss
    loss.backward()
    return loss.detach(), behaviours.gradients(model)


@each_recipe
def test_training_step(recipe: str, name: str) -> None:
    """Loss with its auxiliary part and all gradients, through the autograd of the compiled graph."""
    model, inputs = one_layer(recipe, name), tiny.batch(name)
    inputs["attention_mask"][0, -3:] = 0
    inputs["labels"][0, -3:] = -100
    wanted = step(model, inputs, model)
    counts = [b.clone() for n, b in model.named_buffers() if n.endswith("load_counts")]
    again = one_layer(recipe, name)
    got = step(again, inputs, torch.compile(again, backend="aot_eager", fullgraph=True, dynamic=False))
    no_breaks()
    close(got[0], wanted[0], "same_math_fp32")
    for key in wanted[1]:
        close(got[1][key], wanted[1][key], "same_math_fp32")
    for a, b in zip([b for n, b in again.named_buffers() if n.endswith("load_counts")], counts, strict=True):
        assert torch.equal(a, b)


@behaviours.over([("mola", "llama"), ("xlora", "llama")])
def test_recording_a_compiled_model(recipe: str, name: str) -> None:
    """A tape may break the graph, but it holds what the plain model's tape holds, and the outputs stay."""
    model, inputs = one_layer(recipe, name), tiny.batch(name)
    compiled = torch.compile(model, backend="eager", dynamic=False)
    with molora.record_routing(model) as wanted:
        on = tiny.output(model, inputs)
    with molora.record_routing(model) as tape:
        close(tiny.output(compiled, inputs), on, "same_math_fp32")
    assert list(tape) == list(wanted)
    for site in wanted:
        assert torch.equal(tape[site][0].weights, wanted[site][0].weights)
    close(tiny.output(compiled, inputs), on, "same_math_fp32")
    assert [len(records) for records in tape.values()] == [1] * len(tape)


def test_a_converted_copy_of_a_compiled_model_is_apart() -> None:
    model, inputs = one_layer("mola", "llama"), tiny.batch("llama")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    expected = tiny.output(compiled, inputs)
    clone = copy.deepcopy(model)
    with clone.disable_adapter():
        assert torch.equal(tiny.output(compiled, inputs), expected)
