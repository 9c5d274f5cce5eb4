"""DPO on a base that has routed experts of its own: its balance loss, with TRL's coefficient, and the mixture's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

import molora
from molora.training.preference import DPOTrainer
from tests.support import tiny, tiny_text
from tests.support.tolerances import close
from tests.training.test_preference import added, by_hand, dpo, gradients


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3-MoE with a tokenizer."""
    place = tmp_path_factory.mktemp("routed")
    tokenizer = tf.AutoTokenizer.from_pretrained(tiny_text.model_folder(tmp_path_factory.mktemp("tiny")))
    sizes = {**tiny.GQA, "vocab_size": len(tokenizer), "head_dim": 8, "moe_intermediate_size": 16}
    config = tf.Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.7)
    tf.Qwen3MoeForCausalLM(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def converted(folder: Path) -> Any:
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    return tiny.arm(molora.convert(base, "mola", r=2, num_experts=2, router_aux_loss_coef=1.0))


def test_both_balance_losses_count(folder: Path, tmp_path: Path) -> None:
    it, hand = dpo(DPOTrainer, converted(folder), folder, tmp_path), converted(folder).train()
    batch = next(iter(it.get_train_dataloader()))
    it.model.train()
    loss = it.compute_loss(it.model, dict(batch))
    loss.backward()
    preference, balance = by_hand(hand, batch)
    hand.config.output_router_logits = True
    both = added(hand, batch)
    assert both - balance > 0.5, "the base's own says nothing"
    (preference + both).backward()
    close(loss.detach(), (preference + both).detach(), "same_math_fp32")
    for name, gradient in gradients(hand).items():
        close(it.model.get_parameter(name).grad, gradient, "same_math_fp32")
