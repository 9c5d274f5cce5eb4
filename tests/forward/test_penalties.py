"""Penalties on the experts' parameters: by hand, once a step whatever the micro-batches, in every way to train."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.config import MoloraConfig
from molora.config.options import PenaltyConfig
from molora.errors import ConfigError, MoloraError
from molora.penalties import PENALTIES
from tests.support import tiny
from tests.support.tolerances import close

COEF = 0.3


def config(recipe: str = "mola", coef: float = COEF, **options: Any) -> MoloraConfig:
    """A recipe with a penalty on all of its placements."""
    plain = getattr(molora.recipes, recipe)(**{"r": 2, **options})
    penalties = (PenaltyConfig(kind="orthogonal", coef=coef),)
    return plain.replace(placements=tuple(p.replace(penalties=penalties) for p in plain.placements))


def converted(recipe: str = "mola", **options: Any) -> Any:
    return tiny.arm(molora.convert(tiny.base_model("llama"), config(recipe, **options))).train()


def by_hand(model: Any) -> Tensor:
    """``sum over linears, i < j of ||A_i A_j^T||_F^2``, expert by expert in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for m in model.modules():
        bank = getattr(m, "bank", None)
        if bank is None:
            continue
        experts = [bank.lora_A[bank.span(e)].double() for e in range(len(bank.ranks))]
        for i, a in enumerate(experts):
            for b in experts[i + 1 :]:
                total = total + (a @ b.T).square().sum()
    return total


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recipe", ["mola", "mixlora"])
def test_the_loss_grows_by_the_value_by_hand_and_so_do_the_gradients(recipe: str) -> None:
    model, plain = converted(recipe), converted(recipe, coef=0.0)
    batch = tiny.batch("llama")
    value = by_hand(model)
    assert value > 0.1
    loss, without = model(**batch).loss, plain(**batch).loss
    close(loss.double(), without.double() + COEF * value, "same_math_fp32")
    with_penalty, task = gradients(model, loss), gradients(plain, without)
    own = gradients(model, COEF * by_hand(model).float())
    for name, t in with_penalty.items():
        close(t, task[name] + own.get(name, torch.zeros(())), "same_math_fp32")


def test_a_step_has_it_once_whatever_its_micro_batches() -> None:
    model = converted()
    batch = tiny.batch("llama", rows=4)
    items = (batch["labels"][:, 1:] != -100).sum()
    whole = gradients(model, model(**batch, num_items_in_batch=items).loss)
    halves = [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]
    model.zero_grad()
    for half in halves:
        model(**half, num_items_in_batch=items).loss.backward()
    for name, p in model.named_parameters():
        if name in whole:
            close(p.grad, whole[name], "additive")


def test_not_in_evaluation() -> None:
    model, batch = converted(), tiny.batch("llama")
    plain = converted(coef=0.0)
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).loss, plain.eval()(**batch).loss)


def test_checkpointing_compilation_and_copies_change_nothing() -> None:
    batch = tiny.batch("llama")
    expected = gradients(model := converted(), model(**batch).loss)
    copied = copy.deepcopy(model)
    checkpointed = converted()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for other in (copied, checkpointed):
        found = gradients(other, other(**batch).loss)
        assert found.keys() == expected.keys()
        for name, t in found.items():
            assert torch.equal(t, expected[name]), name
    torch._dynamo.reset()
    model.zero_grad()
    torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).loss.backward()
    for name, t in expected.items():
        close(dict(model.named_parameters())[name].grad, t, "same_math_fp32")


def test_it_is_saved_and_an_expert_more_has_its_share(tmp_path: Path) -> None:
    model = converted(num_experts=2)
    model.add_expert()
    model.save_pretrained(tmp_path)
    assert '"penalties"' in (tmp_path / "adapter_config.json").read_text()
    again = molora.load(tiny.base_model("llama"), tmp_path, trainable=True).train()
    batch = tiny.batch("llama")
    assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_rank_one_experts_and_one_expert_alone() -> None:
    ranks = converted("smora", r=4, top_k=2)
    close(ranks(**tiny.batch("llama")).loss.double(), off(ranks) + COEF * by_hand(ranks), "same_math_fp32")
    one = converted("lora")
    assert by_hand(one) == 0
    assert one(**tiny.batch("llama")).loss.isfinite()
    with pytest.raises(MoloraError, match="outside of the converted model's forward"):
        one.model.layers[0].self_attn.q_proj(torch.zeros(1, 3, 32))


def off(model: Any) -> Tensor:
    """The loss without the penalty: the evaluation's, where nothing is random."""
    with torch.no_grad():
        loss: Tensor = model.eval()(**tiny.batch("llama")).loss.double()
    model.train()
    return loss


def test_wrong_penalties_are_refused_before_anything_is_changed() -> None:
    base = tiny.base_model("llama")
    wrong = config().placements[0].replace(penalties=(PenaltyConfig(kind="ortogonal"),))
    with pytest.raises(ConfigError, match="penalty: got 'ortogonal', expected one of orthogonal.*did you mean"):
        molora.convert(base, config().replace(placements=(wrong,)))
    assert type(base) is type(tiny.base_model("llama"))
    still = config().placements[0].replace(train_experts=False)
    with pytest.raises(ConfigError, match="'orthogonal' is on lora_A, expected experts that have it and train it"):
        molora.convert(base, config().replace(placements=(still,)))
    with pytest.raises(ConfigError, match="coef: got -1"):
        PenaltyConfig(coef=-1)
    with pytest.raises(ConfigError, match="the same rule twice"):
        wrong.replace(penalties=(PenaltyConfig(), PenaltyConfig()))


@pytest.mark.parametrize("kind", PENALTIES)
def test_every_penalty_has_a_finite_gradient_on_its_tiny_options(kind: str) -> None:
    plain = molora.recipes.mola(r=2)
    own = tuple(p.replace(penalties=(PENALTIES[kind].tiny(),)) for p in plain.placements)
    model = tiny.arm(molora.convert(tiny.base_model("llama"), plain.replace(placements=own))).train()
    assert all(t.isfinite().all() for t in gradients(model, model(**tiny.batch("llama")).loss).values())
