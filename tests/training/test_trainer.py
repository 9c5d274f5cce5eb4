"""molora's Trainer in one process: it trains as transformers' own does, and says what the routing does."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import molora
from molora.errors import ConfigError
from molora.routers import LinearRouter
from molora.surgery.install import sites_of
from molora.training import Trainer
from molora.training.finite import NonFiniteError
from molora.training.meter import SiteLoad, warnings_of
from tests.support import behaviours, tiny
from tests.support.behaviours import each_recipe
from tests.support.tolerances import close
from tests.support.training_runs import SMOOTH, build, data, logged, run, state, trainer
from tests.support.traits import having

MIXED = having(lambda t: t.grows)


@each_recipe
def test_it_trains_as_transformers_trainer_does(recipe: str, name: str, tmp_path: Path) -> None:
    """Counting, logging and looking at the loss change not one bit of it."""
    models = build(recipe, name), build(recipe, name)
    ours, theirs = run(models[0], tmp_path), run(models[1], tmp_path, own=tf.Trainer)
    assert torch.equal(logged(ours, "loss"), logged(theirs, "loss"))
    behaviours.assert_same(state(models[0]), state(models[1]))


@pytest.mark.parametrize("recipe", having(lambda t: t.grows and t.picks))
def test_the_logs_say_what_a_loop_over_the_recorded_routing_says(recipe: str, tmp_path: Path) -> None:
    model = build(recipe)
    with molora.record_routing(model) as tape:
        it = run(model, tmp_path, max_steps=1, per_device_train_batch_size=8)
    entropy, violation, tokens = [], [], []
    for (record,) in ((r,) for records in tape.values() for r in records if r.num_experts > 1):
        counts, h = [0.0] * record.num_experts, 0.0
        for t in record.valid.nonzero().flatten().tolist():
            for e in record.slot_ids()[t].tolist():
                counts[e] += 1
            p = record.probs[t] / record.probs[t].sum()
            h -= float((p * p.clamp_min(1e-30).log()).sum()) / math.log(record.num_experts)
        load = [c / sum(counts) for c in counts]
        entropy.append(-sum(f * math.log(f) for f in load if f) / math.log(len(load)))
        violation.append(max(load) * len(load) - 1)
        tokens.append(h / int(record.valid.sum()))
    close(logged(it, "routing_entropy"), torch.tensor([sum(entropy) / len(entropy)]), "same_math_fp32")
    close(logged(it, "routing_max_violation"), torch.tensor([max(violation)]), "same_math_fp32")
    close(logged(it, "routing_token_entropy"), torch.tensor([sum(tokens) / len(tokens)]), "same_math_fp32")
    line = json.loads((tmp_path / "routing_log.jsonl").read_text())
    assert line["step"] == 1
    assert len(line["load"]) == len(entropy)


@pytest.mark.parametrize("recipe", having(lambda t: t.balanced))
def test_the_logged_aux_loss_and_routing_do_not_depend_on_accumulation(recipe: str, tmp_path: Path) -> None:
    whole = run(build(recipe), tmp_path / "1", **SMOOTH)
    split = run(build(recipe), tmp_path / "2", **SMOOTH, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    keys = ("aux_loss", "routing_entropy", "routing_max_violation", "routing_token_entropy", "routing_min_load")
    for key in keys:
        assert len(logged(whole, key)) == 3
        close(logged(split, key), logged(whole, key), "additive")


def test_routers_have_a_learning_rate_and_weight_decay_of_their_own(tmp_path: Path) -> None:
    model = build("mixlora")
    it = trainer(model, tmp_path, weight_decay=0.1, router_learning_rate=1e-4, router_weight_decay=0.0)
    it.create_optimizer()
    routers = {id(p) for _, m in sites_of(model).values() if m.router is not None for p in m.router.parameters()}
    seen = set()
    for group in it.optimizer.param_groups:
        for p in group["params"]:
            expected = (1e-4, 0.0) if id(p) in routers else (0.02, 0.1)
            assert (group["lr"], group["weight_decay"]) == expected
            seen.add(id(p))
    assert seen == {id(p) for p in model.parameters() if p.requires_grad}
    before = state(model)
    run(model, tmp_path, router_learning_rate=0.0, weight_decay=0.0)
    assert all(torch.equal(p, before[n]) == ("router" in n) for n, p in state(model).items())


def test_a_loss_that_is_not_finite_stops_with_step_and_module(tmp_path: Path) -> None:
    model = build("mola")
    site, bad = next((p, m) for p, m in sites_of(model).values() if "layers.1" in p and p.endswith("up_proj"))
    before = None

    class Poison(tf.TrainerCallback):
        def on_step_end(self, args: Any, state_: Any, control: Any, **kwargs: Any) -> None:
            nonlocal before
            with torch.no_grad():
                bad.bank.lora_B[0, 0] = torch.inf
            before = state(model)

    it = trainer(model, tmp_path, save_strategy="steps", save_steps=2)
    it.add_callback(Poison())
    with pytest.raises(NonFiniteError, match=rf"step 2: the loss is not finite.*{site} \(MixtureLinear\).*lora_B"):
        it.train()
    assert before is not None
    behaviours.assert_same(state(model), before)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(tmp_path: Path) -> None:
    model = build("mola")
    before = state(model)
    name, p = next((n, p) for n, p in model.named_parameters() if p.requires_grad)
    p.register_hook(lambda g: g * torch.inf)
    with pytest.raises(NonFiniteError, match=f"step 1: the gradient is not finite, first in parameter {name}"):
        run(model, tmp_path)
    behaviours.assert_same(state(model), before)


def site(*load: float, choices: int = 1) -> SiteLoad:
    return SiteLoad("layers.0.mlp", load, choices, 100, 0.5)


def test_collapse_and_dead_experts_are_said_once_in_words() -> None:
    idle: dict[tuple[str, int], int] = {}
    told: set[tuple[str, int]] = set()
    assert warnings_of([site(0.3, 0.3, 0.4, 0.0)], idle, told) == []
    said = warnings_of([site(0.01, 0.98, 0.01, 0.0)], idle, told)
    assert len(said) == 1
    assert "98% of the picks go to expert 1 of 4" in said[0]
    said = warnings_of([site(0.01, 0.98, 0.01, 0.0)], idle, told)
    assert said == ["layers.0.mlp: no token has chosen expert 3 of 4 since 3 logs: it is dead"]
    assert warnings_of([site(0.01, 0.98, 0.01, 0.0)], idle, told) == []
    assert warnings_of([site(0.5, 0.5, 0.0, 0.0, choices=2)], {}, set())[0].startswith("layers.0.mlp: routing has coll")
    assert warnings_of([site(0.5, 0.5, choices=2)], {}, set()) == []  # every expert is always chosen


def test_a_collapse_while_training_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llava_mole")
    for _, m in sites_of(model).values():
        if isinstance(m.router, LinearRouter):
            m.router.weight.data.zero_()  # ties go to the first expert
    with caplog.at_level(logging.WARNING, logger="molora.training.trainer"):
        run(model, tmp_path, router_learning_rate=0.0)
    assert sum("routing has collapsed" in r.getMessage() for r in caplog.records) == 2  # a router a layer, each once
    assert any("it is dead" in r.getMessage() for r in caplog.records)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_a_whole_checkpoint_and_stops(number: int, tmp_path: Path) -> None:
    class Interrupt(tf.TrainerCallback):
        def on_step_begin(self, args: Any, state_: Any, control: Any, **kwargs: Any) -> None:
            if state_.global_step == 1:
                os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    it = trainer(build("mixlora"), tmp_path)
    it.add_callback(Interrupt())
    it.train()
    assert it.state.global_step == 2
    assert it.interrupt.interrupted
    assert molora.training.find_newest(tmp_path) == tmp_path / "checkpoint-2"
    assert signal.getsignal(number) == before


def test_an_interrupted_trainer_can_go_on_itself(tmp_path: Path) -> None:
    it = trainer(build("mixlora"), tmp_path, max_steps=3)
    it.interrupt.asked = 1.0  # of an earlier run
    it.train()
    assert it.state.global_step == 3
    assert not it.interrupt.interrupted


def test_a_resumed_run_logs_the_balance_loss_of_its_own_steps(tmp_path: Path) -> None:
    whole = run(build("mixlora"), tmp_path, save_strategy="steps", save_steps=2)
    resumed = run(build("mixlora"), tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logged(resumed, "aux_loss"), logged(whole, "aux_loss"))


def test_a_loss_that_is_not_the_models_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="label_smoothing_factor, compute_loss_func.*would be lost"):
        trainer(build("mixlora"), tmp_path, label_smoothing_factor=0.1)
    trainer(build("lora"), tmp_path, label_smoothing_factor=0.1)  # nothing to lose


def test_an_optimizer_that_makes_its_own_groups_is_refused_with_a_router_rate(tmp_path: Path) -> None:
    it = trainer(build("mixlora"), tmp_path, router_learning_rate=1e-4)
    it.optimizer_cls_and_kwargs = (lambda: torch.optim.SGD, {})  # what transformers calls a factory
    with pytest.raises(ConfigError, match="makes its own groups"):
        it.create_optimizer()


def test_a_model_that_was_not_converted_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"got a LlamaForCausalLM, expected a model that convert\(\)"):
        Trainer(tiny.base_model("llama"), None)


@pytest.mark.parametrize("recipe", MIXED)
def test_a_plain_loop_trains_the_same(recipe: str, tmp_path: Path) -> None:
    """Nothing but ``loss.backward()``: the model adds its balance loss, and its bias moves with the optimizer."""
    models = build(recipe), build(recipe)
    run(models[0], tmp_path, **SMOOTH, per_device_train_batch_size=8, lr_scheduler_type="constant")
    plain: nn.Module = models[1].train()
    optimizer = torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1)
    batch = {k: torch.tensor([row[k] for row in data(plain)]) for k in data(plain)[0]}
    for _ in range(3):
        optimizer.zero_grad()
        plain(**batch).loss.backward()
        optimizer.step()
    for n, p in state(models[0]).items():
        close(state(plain)[n], p, "same_math_fp32")
