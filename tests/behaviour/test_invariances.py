"""What must not matter: the other rows of a batch, padding and its side, and who computed before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora import context
from tests.support import behaviours, tiny
from tests.support.behaviours import causal_matrix, each_recipe, matrix
from tests.support.tolerances import close

ROWS = 7


def rows_of(inputs: dict[str, Tensor], rows: Tensor) -> dict[str, Tensor]:
    return {k: v[rows] for k, v in inputs.items()}


def clear_choices(records: list[Any], rows: int) -> list[tuple[Tensor, Tensor]]:
    """A record: (sorted ids (rows, tokens, K), whether the choice is clear (rows, tokens)); none for dense routers."""
    out = []
    for r in records:
        if r.ids is None:
            continue
        K, ranked = r.ids.shape[1], r.logits.sort(-1, descending=True).values
        clear = ranked[:, K - 1] - ranked[:, K] > 1e-4 if ranked.shape[1] > K else torch.ones(len(ranked)).bool()
        out.append((r.ids.sort(-1).values.view(rows, -1, K), clear.view(rows, -1)))
    return out


@matrix
def test_rows_do_not_see_each_other(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), tiny.batch(name, rows=ROWS)
    with molora.record_routing(model) as tape:
        whole = tiny.output(model, inputs)
    chosen = {site: clear_choices(records, ROWS) for site, records in tape.items()}
    shares = [clear.float().mean() for parts in chosen.values() for _, clear in parts]
    assert not shares or torch.stack(shares).mean() > 0.99
    for rows in (torch.tensor([3]), torch.tensor([0, 5]), torch.randperm(ROWS)):
        with molora.record_routing(model) as tape:
            part = tiny.output(model, rows_of(inputs, rows))
        close(part, whole[rows], "same_math_fp32")
        for site, records in tape.items():
            for (ids, _), (all_ids, clear) in zip(clear_choices(records, len(rows)), chosen[site], strict=True):
                assert torch.equal(ids[clear[rows]], all_ids[rows][clear[rows]]), site


def padded(ids: Tensor, labels: Tensor, lengths: list[int], side: str, seed: int) -> dict[str, Tensor]:
    """Rows cut to ``lengths`` and padded with random tokens; positions and labels of the real ones as they were."""
    B, S = ids.shape
    out = {
        "input_ids": torch.randint(3, 64, (B, S), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": torch.zeros(B, S, dtype=torch.long),
        "position_ids": torch.zeros(B, S, dtype=torch.long),
        "labels": torch.full((B, S), -100),
    }
    for b, n in enumerate(lengths):
        here = slice(S - n, S) if side == "left" else slice(0, n)
        out["input_ids"][b, here], out["labels"][b, here] = ids[b, :n], labels[b, :n]
        out["attention_mask"][b, here], out["position_ids"][b, here] = 1, torch.arange(n)
    return out


@causal_matrix
def test_padding_on_either_side_is_no_padding(recipe: str, name: str) -> None:
    """Logits, loss, aux_loss and every gradient; random pad tokens. The loss-free bias counts the same picks."""
    inputs = tiny.batch(name, rows=2, length=9)
    labels, lengths = inputs["labels"].clone(), [9, 6]
    labels[:, 0] = -100  # a label that only the shift reaches differs between sides
    results = []
    for side, seed in (("left", 1), ("left", 2), ("right", 3)):
        batch = padded(inputs["input_ids"], labels, lengths, side, seed)
        model = behaviours.armed(recipe, name)
        real = batch["attention_mask"].bool()
        logits = tiny.output(model, batch)[real]
        loss, grads = behaviours.train_step(model, batch)
        counts = [b.clone() for n, b in model.named_buffers() if n.endswith("load_counts")]
        results.append((logits, loss, grads, counts))
    alone = [
        tiny.output(model.eval(), {"input_ids": inputs["input_ids"][b : b + 1, :n]})[0] for b, n in enumerate(lengths)
    ]
    for logits, loss, grads, counts in results:
        close(logits, torch.cat(alone), "same_math_fp32")
        close(loss, results[0][1], "same_math_fp32")
        for key in grads:
            close(grads[key], results[0][2][key], "same_math_fp32")
        for a, b in zip(counts, results[0][3], strict=True):
            assert torch.equal(a, b)


@behaviours.over([(r, n) for r, n in behaviours.PAIRS if n in ("bert", "t5")])
def test_right_padding_of_encoders(recipe: str, name: str) -> None:
    inputs = tiny.batch(name, rows=2, length=9)
    results = []
    for extra, seed in ((0, 0), (4, 1), (4, 2)):
        model = behaviours.armed(recipe, name)
        pad = torch.randint(3, 64, (2, extra), generator=torch.Generator().manual_seed(seed))
        longer = {
            **inputs,
            "input_ids": torch.cat([inputs["input_ids"], pad], 1),
            "attention_mask": torch.cat([inputs["attention_mask"], torch.zeros_like(pad)], 1),
        }
        results.append((tiny.output(model, longer), *behaviours.train_step(model, longer)))
    for logits, loss, grads in results[1:]:
        close(logits, results[0][0], "same_math_fp32")
        close(loss, results[0][1], "same_math_fp32")
        for key in grads:
            close(grads[key], results[0][2][key], "same_math_fp32")


@matrix
def test_nothing_random_and_nothing_changed(recipe: str, name: str) -> None:
    """Eval twice, train twice from one seed: the same bits; inputs and weights are as they were."""
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    weights, before = behaviours.digest(model.state_dict()), {k: v.clone() for k, v in inputs.items()}
    first = tiny.output(model, inputs)
    assert torch.equal(first, tiny.output(model, inputs))
    pointers = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert first.untyped_storage().data_ptr() not in pointers
    assert behaviours.digest(model.state_dict()) == weights
    steps = []
    for _ in range(2):
        torch.manual_seed(3)
        steps.append(behaviours.train_step(model, inputs))
    assert torch.equal(steps[0][0], steps[1][0])
    behaviours.assert_same(steps[0][1], steps[1][1])
    for k, v in inputs.items():
        assert torch.equal(v, before[k])


class TrapError(Exception):
    """Raised on purpose inside a forward."""


def trap(*args: Any) -> None:
    raise TrapError


@matrix
def test_an_exception_inside_forward_leaves_nothing(recipe: str, name: str) -> None:
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    expected = tiny.output(model, inputs)
    last = [m for _, m in behaviours.sites(model)][-1]
    handle = last.register_forward_pre_hook(trap)
    for mode in (model.train(), model.eval()):
        with pytest.raises(TrapError):
            mode(**inputs)
        assert context.current() is None
    handle.remove()
    assert torch.equal(tiny.output(model, inputs), expected)


@matrix
def test_disable_adapter_nests_and_survives_exceptions(recipe: str, name: str) -> None:
    model, inputs = behaviours.shared(recipe, name), tiny.batch(name)
    on, off = tiny.output(model, inputs), tiny.output(tiny.base_model(name), inputs)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model, inputs), off)
        with model.disable_adapter():
            assert torch.equal(tiny.output(model, inputs), off)
        assert torch.equal(tiny.output(model, inputs), off)
        with pytest.raises(TrapError), model.disable_adapter():
            trap()
        assert torch.equal(tiny.output(model, inputs), off)
    assert torch.equal(tiny.output(model, inputs), on)
    with pytest.raises(TrapError), model.disable_adapter():
        trap()
    assert torch.equal(tiny.output(model, inputs), on)


@each_recipe
def test_two_models_do_not_see_each_other(recipe: str, name: str) -> None:
    """One model's forward runs inside the other's, as a reward model's or a draft model's may."""
    outer, inner = behaviours.armed(recipe, name), behaviours.armed(recipe, "gpt2")
    inputs = tiny.batch(name, rows=3)
    expected = tiny.output(outer, inputs), tiny.output(inner, inputs)
    seen = []

    def run_inner(*args: Any) -> None:
        with inner.disable_adapter():
            seen.append(tiny.output(inner, rows_of(inputs, torch.tensor([1]))))
        seen.append(tiny.output(inner, inputs))

    first = next(m for _, m in behaviours.sites(outer))
    handle = first.register_forward_hook(run_inner)
    assert torch.equal(tiny.output(outer, inputs), expected[0])
    handle.remove()
    close(seen[0], tiny.output(tiny.base_model("gpt2"), inputs)[1:2], "same_math_fp32")
    assert torch.equal(seen[1], expected[1])
    with outer.disable_adapter():
        assert torch.equal(tiny.output(inner, inputs), expected[1])


@each_recipe
def test_recording_changes_nothing(recipe: str, name: str) -> None:
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    plain = behaviours.train_step(model, inputs)
    with molora.record_routing(model) as tape:
        taped = behaviours.train_step(copy.deepcopy(model), inputs)
        assert not tape, "the tape belongs to one model, not to its copies"
        again = behaviours.train_step(model, inputs)
    assert tape
    for loss, grads in (taped, again):
        assert torch.equal(loss, plain[0])
        behaviours.assert_same(grads, plain[1])
