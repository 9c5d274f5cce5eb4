"""The plain Hugging Face Trainer: gradient accumulation, checkpointing by its flag, and what its forward is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

import molora
from molora.config import BalanceConfig, MoloraConfig
from tests.support import behaviours, tiny
from tests.support.behaviours import each_recipe
from tests.support.tolerances import close
from tests.support.traits import having, strong, traits

ROWS, LENGTH = 8, 10
STRONG = having(lambda t: t.switch is not None)  # recipes whose balance loss slow loops compute here


def rows() -> list[dict[str, Any]]:
    """Eight texts of unequal length, padded on the right, their prompts masked: unequal numbers of labels a row."""
    ids = tiny.batch("llama", rows=ROWS, length=LENGTH, seed=3)["input_ids"]
    out = []
    for b in range(ROWS):
        length, prompt = (10, 4, 7, 9, 5, 10, 6, 8)[b], (1, 2, 5, 3, 1, 8, 2, 0)[b]
        real = torch.arange(LENGTH) < length
        labels = ids[b].masked_fill(~real | (torch.arange(LENGTH) < prompt), -100)
        out.append(
            {
                "input_ids": ids[b].masked_fill(~real, 0).tolist(),
                "attention_mask": real.long().tolist(),
                "labels": labels.tolist(),
                "task_ids": b % 3,
            }
        )
    return out


def build(recipe: str, name: str = "llama", **more: Any) -> Any:
    """An armed mixture with a balance loss that weighs as much as the model's own."""
    return tiny.arm(molora.convert(tiny.base_model(name), strong(behaviours.config(recipe, name, **more))))


def train(model: Any, folder: Path, **arguments: Any) -> tuple[list[float], dict[str, Tensor]]:
    """(logged losses, what training changed) of two optimizer steps over the eight rows."""
    data = rows()
    if not traits(model).needs_tasks:
        data = [{k: v for k, v in row.items() if k != "task_ids"} for row in data]
    settings = {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    trainer = tf.Trainer(model, tf.TrainingArguments(**{**settings, **arguments}), train_dataset=data)
    trainer.train()
    state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    state |= {n: b.clone() for n, b in model.named_buffers() if n.endswith("select_bias")}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], state


@pytest.mark.parametrize(
    ("recipe", "name"), [*((r, "llama") for r in tiny.RECIPES), ("mixlora", "gpt2"), ("mola", "gpt_neox")]
)
def test_accumulation_4x1_is_1x4(recipe: str, name: str, tmp_path: Path) -> None:
    model = build(recipe, name)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    losses, whole = train(model, tmp_path, per_device_train_batch_size=4)
    many = train(build(recipe, name), tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert len(losses) == 2
    close(torch.tensor(many[0]), torch.tensor(losses), "logged")
    assert all(not torch.equal(whole[n], start[n]) for n in start if "lora" in n or "router" in n)
    for n in whole:
        close(many[1][n], whole[n], "additive")


@each_recipe
def test_checkpointing_by_the_trainers_flag(recipe: str, name: str, tmp_path: Path) -> None:
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    plain = train(build(recipe, lora_dropout=0.1), tmp_path, **split)
    model = build(recipe, lora_dropout=0.1)
    flagged = train(model, tmp_path, **split, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing
    assert flagged[0] == plain[0]
    behaviours.assert_same(flagged[1], plain[1])


def micro_batches(size: int) -> list[dict[str, Tensor]]:
    data = [{k: v for k, v in row.items() if k != "task_ids"} for row in rows()]
    chunks = [data[i : i + size] for i in range(0, ROWS, size)]
    return [{k: torch.tensor([row[k] for row in chunk]) for k in chunk[0]} for chunk in chunks]


def switch_of(records: list[Any], valid: Tensor, rule: BalanceConfig) -> Tensor:
    """Mean over routers of ``E sum_e f_e P_e`` over all real tokens of a micro-batch, by loops."""
    values = []
    for r in records:
        f, P, n = [0.0] * r.num_experts, [0.0] * r.num_experts, 0
        for t in valid.flatten().nonzero().flatten().tolist():
            chosen = r.ids[t].tolist()[: 1 if rule.count == "argmax" else None]
            for e in chosen:
                f[e] += 1 / len(chosen)
            P = [p + float(r.probs[t, e]) for e, p in enumerate(P)]
            n += 1
        values.append(r.num_experts * sum(a / n * b / n for a, b in zip(f, P, strict=True)))
    return torch.tensor(values).mean()


@pytest.mark.parametrize("recipe", STRONG)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_batch_scope_is_the_weighted_sum_of_micro_batches(recipe: str, size: int) -> None:
    """``sum over micro-batches of n / N times its own value``, n its predicted labels, against a slow oracle."""
    model = build(recipe, balance_scope="batch").train()
    rule = traits(model).switch
    assert rule is not None
    assert (rule.coef, rule.scope) == (1.0, "batch")
    batches = micro_batches(size)
    N = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    got, wanted = torch.zeros(()), torch.zeros(())
    for b in batches:
        n = int((b["labels"][:, 1:] != -100).sum())
        with torch.no_grad(), molora.record_routing(model) as tape:
            got += model(**b, num_items_in_batch=N).loss
        records = [r for seen in tape.values() for r in seen if r.num_experts > 1]
        with torch.no_grad():
            value = rule.coef * switch_of(records, b["attention_mask"], rule)
            wanted += model.eval()(**b, num_items_in_batch=N).loss + n / N * value
        model.train()
    close(got, wanted, "additive")


def test_batch_scope_depends_on_the_micro_batch_and_says_so(tmp_path: Path) -> None:
    """The published pooling: a product of averages, which a split of the batch changes. Not the default."""
    assert BalanceConfig().scope == "sequence"
    whole = train(build("mixlora", balance_scope="batch"), tmp_path, per_device_train_batch_size=4)
    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    many = train(build("mixlora", balance_scope="batch"), tmp_path, **split)
    routers = [n for n in whole[1] if "router" in n]
    assert max(float((whole[1][n] - many[1][n]).abs().max()) for n in routers) > 1e-3


@each_recipe
def test_the_trainer_keeps_our_columns_and_saves_the_adapter(recipe: str, name: str, tmp_path: Path) -> None:
    model = build(recipe)
    settings = tf.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    trainer = tf.Trainer(model, settings, train_dataset=rows())
    assert trainer.model_accepts_loss_kwargs
    trainer._set_signature_columns_if_needed()
    assert "task_ids" in trainer._signature_columns
    if not traits(recipe).needs_tasks:
        trainer.train_dataset = [{k: v for k, v in row.items() if k != "task_ids"} for row in rows()]
    trainer.train()
    saved = tmp_path / "checkpoint-1"
    assert (saved / "adapter_model.safetensors").stat().st_size < 600_000
    assert not list(saved.glob("model*.safetensors"))
    loaded = molora.load(tiny.base_model("llama"), saved)
    assert isinstance(loaded._molora.config, MoloraConfig)
    inputs = tiny.batch("llama")
    assert torch.equal(tiny.output(loaded.eval(), inputs), tiny.output(model.eval(), inputs))
