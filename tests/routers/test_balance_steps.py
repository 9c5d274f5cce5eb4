"""Balance over several forwards and steps: accumulation, the supervised gate loss, the loss-free bias (B12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from tests.support.tiny import arm, base_model, batch, converted, options
from tests.support.tolerances import close

ROWS = 4
OPTIONS: dict[str, dict[str, Any]] = {
    "mixlora": {"router_aux_loss_coef": 0.5},
    "mola": {"router_aux_loss_coef": 0.5},
    "llava_mole": {"router_aux_loss_coef": 0.5},
    "meteora": {"gate_loss_coef": 0.5},
}


def uneven(recipe: str) -> dict[str, Tensor]:
    """Four rows with padding on both sides, prompts that are not predicted, and a row that predicts nothing."""
    inputs = batch("llama", ROWS, 8, seed=5)
    inputs["attention_mask"][0, -3:] = 0
    inputs["attention_mask"][1, :2] = 0
    inputs["labels"][inputs["attention_mask"] == 0] = -100
    inputs["labels"][2, :6] = -100
    inputs["labels"][3] = -100
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    if recipe == "meteora":
        inputs["task_ids"] = torch.tensor([0, 2, 1, -100])
    return inputs


def gradients(model: Any, inputs: dict[str, Tensor], parts: list[list[int]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step made of ``parts`` (rows each), as the Trainer makes it."""
    model.zero_grad()
    items = (inputs["labels"][:, 1:] != -100).sum()
    total = torch.zeros(())
    for rows in parts:
        loss = model(**{k: v[rows] for k, v in inputs.items()}, num_items_in_batch=items).loss
        loss.backward()
        total = total + loss.detach()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


SPLITS = {"1x4": [[0, 1, 2, 3]], "2x2": [[0, 1], [2, 3]], "4x1": [[0], [1], [2], [3]], "3+1": [[3, 1, 0], [2]]}


@pytest.mark.parametrize("split", ["2x2", "4x1", "3+1"])
@pytest.mark.parametrize("recipe", OPTIONS)
def test_accumulation_is_additive(recipe: str, split: str, root: Path):
    model, inputs = converted(recipe, "llama", root, **OPTIONS[recipe]).train(), uneven(recipe)
    whole, parts = (gradients(model, inputs, SPLITS[s]) for s in ("1x4", split))
    close(parts[0], whole[0], "additive")
    for name, grad in whole[1].items():
        close(parts[1][name], grad, "additive")
    routers = [n for n in whole[1] if "router" in n]
    assert any(whole[1][n].abs().max() > 1e-4 for n in routers)


@pytest.mark.parametrize("recipe", ["mixlora", "mola"])
def test_batch_scope_is_the_weighted_sum_of_micro_batches(recipe: str, root: Path):
    """Its value depends on the micro-batch, as published: each forward's own, times its share of the labels."""
    model, inputs = converted(recipe, "llama", root, balance_scope="batch", **OPTIONS[recipe]), uneven(recipe)
    items = (inputs["labels"][:, 1:] != -100).sum(1)

    def aux(rows: list[int], total: int) -> float:
        part = {k: v[rows] for k, v in inputs.items()}
        with torch.no_grad():
            with_aux = model.train()(**part, num_items_in_batch=torch.tensor(total)).loss
            return float(with_aux - model.eval()(**part, num_items_in_batch=torch.tensor(total)).loss)

    N = int(items.sum())
    for rows in ([0, 1], [2, 3]):
        n = int(items[rows].sum())
        assert aux(rows, N) == pytest.approx(aux(rows, n) * n / N, rel=1e-4)
    split = aux([0, 1], N) + aux([2, 3], N)
    assert split != pytest.approx(aux([0, 1, 2, 3], N), rel=1e-3), "then it need not be a scope of its own"


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("released", [False, True])
def test_supervised_gate_loss(released: bool, per_token: bool, root: Path):
    """MeteoRA sec. 3.3: mean cross entropy of the gates' logits to the task; released: logits[:-1] to task[1:]."""
    own = {"released": released, "gate_loss_coef": 0.5, "lora_dropout": 0.0, "init_std": None}
    model, inputs = converted("meteora", "llama", root, **own).train(), uneven("meteora")
    task = inputs["task_ids"].unsqueeze(1).expand(ROWS, 8).clone()
    if per_token:
        task[0, 2], task[1, 4:] = -100, 1
        inputs["task_ids"] = task
    with molora.record_routing(model) as tape, torch.no_grad():
        outputs = model(**inputs)
        plain = model.eval()(**inputs)
    n_rows = [float((row[1:] != -100).sum()) for row in inputs["labels"]]
    values = []
    for records in tape.values():
        logits = records[0].logits.view(ROWS, 8, -1)
        value = 0.0
        for b in range(ROWS):
            terms = []
            for s in range(8 - released):
                label = task[b, s + released]
                if inputs["attention_mask"][b, s + released] and label >= 0:
                    terms.append(-torch.log_softmax(logits[b, s], -1)[label])
            value += n_rows[b] / sum(n_rows) * float(sum(terms)) / max(len(terms), 1)
        values.append(value)
    assert len(values) == 14
    assert float(outputs.loss - plain.loss) == pytest.approx(0.5 * sum(values) / 14, rel=1e-4)


def test_supervised_loss_teaches_the_named_expert(root: Path):
    model = converted("meteora", "llama", root, gate_loss_coef=10.0).train()
    inputs = {**batch("llama"), "task_ids": torch.tensor([2, 2])}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(10):
        out = model(**inputs)
        losses.append(out.aux_loss.item())
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


def test_without_task_ids_there_is_no_gate_loss(root: Path):
    model, inputs = converted("meteora", "llama", root), batch("llama")
    with torch.no_grad():
        assert torch.equal(model.train()(**inputs).loss, model.eval()(**inputs).loss)


# ---- the loss-free bias ----


def biased(root: Path, **own: Any) -> Any:
    """SMoRA with random routers and a zero bias that moves fast enough to see."""
    model = molora.convert(base_model("llama"), "smora", **options("smora", "llama", root, **own))
    arm(model)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, molora.routers.BiasedRouter):
                m.select_bias.zero_()
    return model


def routers(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, molora.routers.BiasedRouter)]


def load(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Standard deviation of the ranks' picks over their mean; mean over routers."""
    with molora.record_routing(model) as tape, torch.no_grad():
        model.eval()(**{k: v for k, v in inputs.items() if k != "labels"})
    spread = []
    for records in tape.values():
        counts = records[0].ids[records[0].valid].flatten().bincount(minlength=16).float()
        spread.append(counts.std() / counts.mean())
    return torch.stack(spread).mean()


def test_loss_free_bias_evens_out_the_load(root: Path):
    """B12: the router's weights stand still, only the bias moves, and the spread of the load halves."""
    model, inputs = biased(root), batch("llama", 4, 16)
    weights = [r.weight.clone() for r in routers(model)]
    before = load(model, inputs)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()
    for _ in range(60):
        model(**inputs).loss.backward()
        optimizer.step()
    after = load(model, inputs)
    assert after < 0.5 * before, f"{before} to {after}"
    assert all(torch.equal(r.weight, w) for r, w in zip(routers(model), weights, strict=True))


def test_bias_moves_once_an_optimizer_step_by_the_sign_rule(root: Path):
    """b += rate * sign(mean(c) - c), c over both micro-batches, padding left out; forwards alone move nothing."""
    model, inputs = biased(root), uneven("smora")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)
    with molora.record_routing(model) as tape:
        for rows in ([0, 1], [2, 3]):
            model(**{k: v[rows] for k, v in inputs.items()}).loss.backward()
    assert not any(r.select_bias.any() for r in routers(model)), "only a step moves the bias"
    model.eval()(**inputs)
    optimizer.step()
    sites = {n.removesuffix(".router"): m for n, m in model.named_modules() if n.endswith(".router")}
    for path, records in tape.items():
        counts = sum(r.ids[r.valid].flatten().bincount(minlength=16) for r in records).float()
        expected = 1e-2 * torch.sign(counts.mean() - counts)
        close(sites[path].select_bias, expected, "same_math_fp32")
    frozen = [r.select_bias.clone() for r in routers(model)]
    model.eval()(**inputs)
    optimizer.step()
    assert all(torch.equal(r.select_bias, b) for r, b in zip(routers(model), frozen, strict=True))


def test_bias_has_no_gradient_and_stays_out_of_the_weight(root: Path):
    model = biased(root).train()
    out = model(**batch("llama"))
    out.loss.backward()
    for r in routers(model):
        assert r.select_bias.grad is None
        assert not r.select_bias.requires_grad
    assert not any("select_bias" in n for n, _ in model.named_parameters())
    assert any("select_bias" in n for n in model.state_dict())


def test_released_bias_enters_the_weight(root: Path):
    """The weights change with the bias only as released."""
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    for released in (False, True):
        model = biased(root, released=released, top_k=16)
        with torch.no_grad():
            before = model(**inputs).logits
            for r in routers(model):
                r.select_bias += torch.linspace(0, 0.5, 16)
            assert torch.allclose(model(**inputs).logits, before, atol=1e-6) == (not released)
