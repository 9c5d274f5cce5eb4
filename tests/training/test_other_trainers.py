"""A converted model in loops that know nothing of it: TRL's SFTTrainer; and molora's Trainer under others' reports."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as tf
import trl
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import molora
from molora.errors import ConfigError, MoloraError
from molora.training.sft import SFTTrainer
from tests.support import tiny, tiny_text
from tests.support.tolerances import close
from tests.support.training_runs import build, logged, run, state, trainer
from tests.support.traits import having

QUIET: dict[str, Any] = {"use_cpu": True, "disable_tqdm": True, "report_to": [], "bf16": False, "fp16": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.model_folder(tmp_path_factory.mktemp("tiny"))


def base_digest(model: Any) -> str:
    """sha256 over every parameter of the base."""
    sha256 = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not any(part in name for part in ("bank.", "router")):
            sha256.update(p.detach().numpy().tobytes())
    return sha256.hexdigest()


ROWS = [{"prompt": "count one two", "completion": " three four"}, {"prompt": "count two", "completion": " three"}] * 4


def sft(own: Any, recipe: str, folder: Path, out: Path, **options: Any) -> Any:
    """An SFT trainer over prompts and completions, which TRL tokenises and masks; on an armed mixture."""
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    model = tiny.arm(molora.convert(base, recipe, **{**tiny.SMALL[recipe], **options}))
    arguments = trl.SFTConfig(
        output_dir=str(out), max_steps=3, learning_rate=0.05, logging_steps=1, max_length=32, save_steps=3,
        per_device_train_batch_size=2, **QUIET,
    )  # fmt: skip
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    return own(model, args=arguments, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer)


@pytest.mark.parametrize("recipe", having(lambda t: t.grows))
def test_sft_by_trl_trains_and_saves(recipe: str, folder: Path, tmp_path: Path) -> None:
    """Every expert and router moves, nothing of the base does, and a checkpoint is an adapter."""
    it = sft(SFTTrainer, recipe, folder, tmp_path)
    model = it.model
    before, digest = state(model), base_digest(model)
    it.train()
    after = state(model)
    assert all(not torch.equal(before[n], after[n]) for n in before if "lora_" in n)
    assert any(not torch.equal(before[n], after[n]) for n in before if "router" in n)
    assert base_digest(model) == digest
    assert logged(it, "loss")[-1] < logged(it, "loss")[0]
    loaded = molora.load(tf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "checkpoint-3").eval()
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(tiny.output(loaded, inputs), tiny.output(model.eval(), inputs))


def test_sft_by_trl_counts_the_balance_loss(folder: Path, tmp_path: Path) -> None:
    runs = [sft(SFTTrainer, "mixlora", folder, tmp_path / str(c), router_aux_loss_coef=c) for c in (1.0, 1e-9)]
    for it in runs:
        it.train()
    first = [logged(it, "loss")[0] for it in runs]
    close(first[0] - first[1], logged(runs[0], "aux_loss")[0], "same_math_fp32")


def test_trls_own_trainer_trains_plain_lora_and_says_what_a_mixture_needs(folder: Path, tmp_path: Path) -> None:
    """It goes past the model's forward: what would be lost there is an error, never a silently wrong run."""
    lora = sft(trl.SFTTrainer, "lora", folder, tmp_path)
    lora.train()
    assert logged(lora, "loss")[-1] < logged(lora, "loss")[0]
    for recipe in ("mixlora", "smora"):
        with pytest.raises(MoloraError, match=r"for TRL molora\.training\.sft\.SFTTrainer"):
            sft(trl.SFTTrainer, recipe, folder, tmp_path).train()


def test_tensorboard_gets_the_balance_loss_and_the_routing(tmp_path: Path) -> None:
    run(build("mixlora"), tmp_path, report_to=["tensorboard"])
    events = next((tmp_path).rglob("events.out.tfevents.*"))
    board = EventAccumulator(str(events.parent)).Reload()
    names = set(board.Tags()["scalars"])
    wanted = {"loss", "aux_loss", "routing_entropy", "routing_max_violation", "routing_min_load"}
    assert {f"train/{n}" for n in wanted} <= names
    assert [e.step for e in board.Scalars("train/routing_entropy")] == [1, 2, 3]


def test_fsdp_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fsdp: accelerate trains without it on a CPU.*take deepspeed zero3"):
        trainer(build("mixlora"), tmp_path, fsdp=True)
