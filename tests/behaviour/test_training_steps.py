"""Training steps: every parameter gets its gradient, and balance rules act once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from molora.config import BalanceConfig
from molora.routers import BALANCES
from tests.support import behaviours, tiny
from tests.support.behaviours import each_recipe, matrix
from tests.support.tolerances import close
from tests.support.traits import traits


@matrix
def test_every_trainable_parameter_gets_a_gradient(recipe: str, name: str) -> None:
    """Also when all tokens go to the first experts: zeros for the others, never nothing."""
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    _, grads = behaviours.train_step(model, inputs)
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
    assert all(bool(g.any()) for g in grads.values()), [n for n, g in grads.items() if not g.any()]
    assert not any(p.grad is not None for p in model.parameters() if not p.requires_grad)
    if not traits(recipe).picks:  # every expert is always in use
        return
    count = max(m.site.top_k or 0 for _, m in behaviours.sites(model))
    for handle in behaviours.force_experts(model, list(range(count))):
        assert handle is not None
    _, grads = behaviours.train_step(model, inputs)
    assert grads.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    idle = 0
    for path, m in behaviours.sites(model):
        if m.site.num_experts > count and f"{path}.bank.lora_A" in grads:
            start = sum(m.site.expert_ranks()[:count])
            assert bool(grads[f"{path}.bank.lora_B"][:, :start].any())
            assert not bool(grads[f"{path}.bank.lora_A"][start:].any())
            assert not bool(grads[f"{path}.bank.lora_B"][:, start:].any())
            idle += 1
    assert idle or not traits(recipe).trains_experts, "some experts are idle here, unless all are frozen"


@each_recipe
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_loss_free_bias_counts_once_and_moves_once_a_step(recipe: str, name: str, checkpointing: bool) -> None:
    """Counts add up over micro-batches; evaluation and the recompute do not count; one update an optimizer step."""
    model = behaviours.armed(recipe, name).train()
    routers = {n: m for n, m in model.named_modules() if getattr(m, "select_bias", None) is not None}
    rules = [b for b in traits(recipe).rules if BALANCES[b.kind].steers]
    assert bool(routers) == bool(rules)
    choices = {f"{path}.router": m.site.top_k for path, m in behaviours.sites(model)}
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batches = [tiny.batch(name, seed=s) for s in (1, 2)]
    batches[1]["attention_mask"][0, -4:] = 0
    masks = torch.cat([b["attention_mask"].flatten() for b in batches])
    counted = [int(masks.sum()) if b.mask_padding else masks.numel() for b in rules]
    start = {n: m.select_bias.clone() for n, m in routers.items()}
    for inputs in batches:
        behaviours.loss_of(model, inputs).backward()
    model.eval()
    tiny.output(model, batches[0])
    model.train()
    for n, m in routers.items():
        assert m.load_counts.sum() == counted[0] * choices[n], "each choice of each token"
        assert torch.equal(m.select_bias, start[n])
    moves = {n: torch.sign(m.load_counts.mean() - m.load_counts) for n, m in routers.items()}
    wanted = {n: start[n] + rules[0].rate * move for n, move in moves.items()}
    optimizer.step()
    for n, m in routers.items():
        assert torch.equal(m.select_bias, wanted[n])
        assert not bool(m.load_counts.any())
    optimizer.zero_grad()
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0).step()
    other = behaviours.armed(recipe, name)
    torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.0).step()
    for n, m in routers.items():
        assert torch.equal(m.select_bias, wanted[n]), "another model's optimizer moved it"


def only(model: Any, rule: BalanceConfig, times: int) -> Any:
    """A copy of the model with one rule of its losses, at so many times its coefficient."""
    model = copy.deepcopy(model)
    for _, m in behaviours.sites(model):
        kept = tuple(b.replace(coef=times * b.coef) if b == rule else b for b in m.placement.balance)
        m.placement = m.placement.replace(balance=tuple(b for b in kept if b.replace(coef=rule.coef) == rule))
    return model


@each_recipe
def test_loss_is_the_base_loss_plus_the_weighted_auxiliary(recipe: str, name: str) -> None:
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    losses = traits(recipe).losses
    task = {"task_ids": torch.tensor([0, 2])} if traits(recipe).needs_tasks else {}
    with torch.no_grad():
        plain = model.eval()(**inputs)
        out = model.train()(**inputs, **task)
        unlabelled = model(**{k: v for k, v in inputs.items() if k != "labels"}, **task)
    assert getattr(plain, "aux_loss", None) is None
    assert torch.equal(out.logits, plain.logits)
    assert out.to_tuple()[0] is out.loss
    assert unlabelled.loss is None
    if not losses:
        assert getattr(out, "aux_loss", None) is None
        assert torch.equal(out.loss, plain.loss)
        return
    assert sum(b.coef for b in losses) > 0
    if len(losses) == 1 and losses[0].reduction == "mean" and traits(recipe).balanced:
        close(out.loss, plain.loss + losses[0].coef * out.aux_loss, "same_math_fp32")
    shares = []
    for rule in losses:  # each adds a share of its own, in proportion to its coefficient
        once, twice = (only(model, rule, times)(**inputs, **task).loss.detach() for times in (1, 2))
        shares.append(once - plain.loss)
        assert shares[-1] > 0
        close(twice, plain.loss + 2 * shares[-1], "same_math_fp32")
    close(out.loss, plain.loss + sum(shares), "same_math_fp32")
    if traits(recipe).balanced:
        if traits(recipe).switch or traits(recipe).needs_tasks:
            assert out.aux_loss > 0.5
        close(unlabelled.aux_loss, out.aux_loss, "same_math_fp32")
    else:
        assert getattr(out, "aux_loss", None) is None
    as_tuple = model(**inputs, **task, return_dict=False)
    assert len(as_tuple) == len(plain.to_tuple())
    close(as_tuple[0], out.loss, "same_math_fp32")
