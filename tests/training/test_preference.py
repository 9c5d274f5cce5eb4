"""DPO and GRPO with a balance loss: TRL's loss plus the mixture's own, and references without it."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf
import trl
from torch import Tensor

import molora
from molora.errors import ConfigError
from molora.training.preference import DPOTrainer, GRPOTrainer
from tests.support import tiny, tiny_text
from tests.support.tolerances import close
from tests.support.training_runs import logged
from tests.support.traits import traits
from tests.training.test_other_trainers import QUIET

PAIRS = [
    {"prompt": "count one two", "chosen": " three four", "rejected": " nine"},
    {"prompt": "count two", "chosen": " three", "rejected": " one one one"},
] * 4
BETA = 0.3
# A large balance loss, so that its gradient would be missed; and one recipe whose balance is no loss.
BALANCED: dict[str, dict[str, Any]] = {
    "mixlora": {"router_aux_loss_coef": 1.0},
    "mola": {"router_aux_loss_coef": 1.0, "balance_scope": "batch"},
    "smora": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.model_folder(tmp_path_factory.mktemp("tiny"))


def base(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder)


def options(recipe: str) -> dict[str, Any]:
    return {**tiny.SMALL[recipe], **BALANCED[recipe]}


def dpo(own: Any, model: Any, folder: Path, out: Path, **more: Any) -> Any:
    settings = more.pop("settings", {})
    arguments = trl.DPOConfig(
        output_dir=str(out), max_steps=2, learning_rate=0.05, logging_steps=1, max_length=32, beta=BETA, save_steps=2,
        per_device_train_batch_size=2, **{"activation_checkpointing": False, **settings, **QUIET},
    )  # fmt: skip
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    rows = datasets.Dataset.from_list(PAIRS)
    return own(model, args=arguments, train_dataset=rows, processing_class=tokenizer, **more)


def gradients(model: Any) -> dict[str, Tensor]:
    """By name without PEFT's prefixes."""
    core = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    return {n: p.grad.clone() for n, p in core.named_parameters() if p.grad is not None}


def score(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Log-probability of each row's completion, (rows,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    return (chosen * batch["completion_mask"][:, 1:]).sum(-1)


def added(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the model's own loss adds to the mean cross entropy of its labels."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    out = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels)
    plain = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    return out.loss - plain


def by_hand(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """DPO (arXiv 2305.18290 eq. 7) against the base, and the balance loss."""
    with torch.no_grad(), model.disable_adapter():
        reference = score(model, batch)
    chosen, rejected = (score(model, batch) - reference).chunk(2)
    return -torch.nn.functional.logsigmoid(BETA * (chosen - rejected)).mean(), added(model, batch)


@pytest.mark.parametrize("wrapped", [False, True], ids=["converted", "peft"])
@pytest.mark.parametrize("recipe", BALANCED)
def test_a_dpo_step_has_the_gradient_of_trls_loss_plus_the_balance_loss(
    recipe: str, wrapped: bool, folder: Path, tmp_path: Path
) -> None:
    hand = tiny.arm(molora.convert(base(folder), recipe, **options(recipe))).train()
    if wrapped:
        it = dpo(DPOTrainer, base(folder), folder, tmp_path, peft_config=molora.peft_config(recipe, **options(recipe)))
        tiny.arm(it.model.get_base_model())
    else:
        it = dpo(DPOTrainer, copy.deepcopy(hand), folder, tmp_path)
    batch = next(iter(it.get_train_dataloader()))
    it.model.train()
    it.current_gradient_accumulation_steps = 1
    loss = it.compute_loss(it.model, dict(batch))
    loss.backward()
    preference, balance = by_hand(hand, batch)
    (preference + balance).backward()
    close(loss.detach(), (preference + balance).detach(), "same_math_fp32")
    found, expected = gradients(it.model), gradients(hand)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        close(found[name], gradient, "same_math_fp32")
    assert it._metrics["train"]["aux_loss"] == pytest.approx([balance.item()], abs=1e-5)
    if traits(recipe).balanced:  # by a loss, and not by a bias
        hand.zero_grad()
        by_hand(hand, batch)[0].backward()
        alone = gradients(hand)
        assert any("router" in n and (alone[n] - g).abs().max() > 0.1 * g.abs().max() for n, g in expected.items())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_dpo_trains_the_routers_and_keeps_its_reference(
    trained: bool, checkpointing: bool, folder: Path, tmp_path: Path
) -> None:
    """The reference is the base for a new adapter and a copy of a trained one: the first loss is log 2 and balance."""
    given, model = molora.peft_config("mixlora", **options("mixlora")), base(folder)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if trained:
        model = peft.get_peft_model(model, given)
        tiny.arm(model.get_base_model())
    before = tiny.output(model.eval(), inputs)
    more = {} if trained else {"peft_config": given}
    settings = {"activation_checkpointing": checkpointing}
    it = dpo(DPOTrainer, model, folder, tmp_path, settings=settings, **more)
    routers = {n: p.detach().clone() for n, p in it.model.named_parameters() if "router" in n and p.requires_grad}
    it.train()
    losses, balance = logged(it, "loss"), logged(it, "aux_loss")
    assert math.isclose(float(losses[0] - balance[0]), math.log(2), rel_tol=1e-3)
    after = dict(it.model.named_parameters())
    assert routers
    assert all(not torch.equal(after[n], p) for n, p in routers.items())
    inner = it.model
    if trained:
        inner.set_adapter("ref")
        assert torch.equal(tiny.output(inner.eval(), inputs), before)
    else:
        with inner.disable_adapter():
            assert torch.equal(tiny.output(inner.eval(), inputs), before)
    loaded = molora.load(base(folder), tmp_path / "checkpoint-2").eval()
    if not trained:
        assert torch.equal(tiny.output(loaded, inputs), tiny.output(inner.eval(), inputs))


def test_dpo_with_gates_for_the_whole_model_makes_both_passes(root: Path, folder: Path, tmp_path: Path) -> None:
    given = tiny.options("xlora", "llama", root)
    it = dpo(DPOTrainer, tiny.arm(molora.convert(base(folder), "xlora", **given)), folder, tmp_path)
    hand = tiny.arm(molora.convert(base(folder), "xlora", **given)).train()
    batch = next(iter(it.get_train_dataloader()))
    it.model.train()
    it.compute_loss(it.model, dict(batch)).backward()
    by_hand(hand, batch)[0].backward()
    found = gradients(it.model)
    assert any("router" in n for n in found)
    for name, gradient in gradients(hand).items():
        close(found[name], gradient, "same_math_fp32")


def test_evaluation_adds_nothing_and_a_copy_computes_with_itself(folder: Path, tmp_path: Path) -> None:
    model = tiny.arm(molora.convert(base(folder), "mixlora", **options("mixlora")))
    it = dpo(DPOTrainer, model, folder, tmp_path)
    batch = next(iter(it.get_train_dataloader()))
    it.model.eval()
    preference, _ = by_hand(copy.deepcopy(model).eval(), batch)
    with torch.no_grad():
        close(it.compute_loss(it.model, dict(batch)), preference.detach(), "same_math_fp32")


class Seen(GRPOTrainer):
    """Keeps the first step's inputs, loss and gradients."""

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        loss = super()._compute_loss(model, inputs)
        if not hasattr(self, "inputs"):
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            found = torch.autograd.grad(loss, list(trained.values()), retain_graph=True)
            self.inputs, self.first, self.gradients = inputs, loss.detach(), dict(zip(trained, found, strict=True))
        return loss


@pytest.mark.parametrize("reward", [lambda text: 1.0, lambda text: float(len(text))], ids=["equal", "by_length"])
def test_a_grpo_step_has_the_gradient_of_trls_loss_plus_the_balance_loss(
    reward: Any, folder: Path, tmp_path: Path
) -> None:
    """Policy loss: minus the mean of advantage times ratio over the completions' tokens (arXiv 2503.14476 eq. 8)."""
    model = tiny.arm(molora.convert(base(folder), "mixlora", **options("mixlora")))
    hand = copy.deepcopy(model).train()
    arguments = trl.GRPOConfig(
        output_dir=str(tmp_path), max_steps=1, learning_rate=0.05, logging_steps=1, max_completion_length=4,
        per_device_train_batch_size=4, num_generations=4, activation_checkpointing=False, temperature=1.0, **QUIET,
    )  # fmt: skip
    own = Seen(
        model,
        reward_funcs=lambda completions, **_: [reward(c) for c in completions],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": r["prompt"]} for r in PAIRS]),
        processing_class=tf.AutoTokenizer.from_pretrained(folder),
    )
    own.train()
    seen = own.inputs
    prompt, mask = seen["prompt_mask"], seen["completion_mask"]
    batch = {
        "input_ids": torch.cat([seen["prompt_ids"], seen["completion_ids"]], 1),
        "attention_mask": torch.cat([prompt, mask], 1),
        "completion_mask": torch.cat([torch.zeros_like(prompt), mask], 1),
    }
    scores = score(hand, batch)  # on policy the gradient of ratio is that of its logarithm, and its value 1
    policy = -(seen["advantages"] * (scores - scores.detach() + mask.sum(-1))).sum() / mask.sum()
    total = policy + added(hand, batch)
    total.backward()
    close(own.first, total.detach(), "same_math_fp32")
    for name, gradient in gradients(hand).items():
        close(own.gradients[name], gradient, "same_math_fp32")
    assert bool(seen["advantages"].any()) == (reward("one") != reward("three"))


def test_what_cannot_be_trained_so_is_said_in_words(root: Path, folder: Path, tmp_path: Path) -> None:
    taught = molora.convert(tiny.base_model("llama"), "meteora", **tiny.options("meteora", "llama", root))
    with pytest.raises(ConfigError, match="its routers learn from task ids, which preferences and rewards do not come"):
        dpo(DPOTrainer, taught, folder, tmp_path)
    given = molora.peft_config("meteora", **tiny.options("meteora", "llama", root))
    with pytest.raises(ConfigError, match="learn from task ids"):
        dpo(DPOTrainer, tiny.base_model("llama"), folder, tmp_path, peft_config=given)
    with pytest.raises(ConfigError, match="without a mixture; give a model that convert"):
        dpo(DPOTrainer, base(folder), folder, tmp_path)


def test_a_trl_that_scores_otherwise_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before 1.16 there is no forward of TRL's on the model, and a balance loss would be lost without a word."""
    monkeypatch.setattr("trl.trainer.dpo_trainer.add_fused_lm_head", lambda *args, **kwargs: None)
    with pytest.raises(ConfigError, match=r"works with TRL from 1\.16 on"):
        dpo(DPOTrainer, molora.convert(base(folder), "mola", r=2), folder, tmp_path)
