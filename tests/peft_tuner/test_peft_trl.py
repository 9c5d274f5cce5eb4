"""TRL's trainers with ``peft_config=`` and with a PeftModel: what they train, save and take as the reference model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers as tf
import trl

import molora
from molora.errors import ConfigError, MoloraError
from molora.training.sft import SFTTrainer
from tests.support import tiny, tiny_text
from tests.support.training_runs import logged, state
from tests.support.traits import having
from tests.training.test_other_trainers import QUIET, ROWS

PAIRS = [{"prompt": "count one two", "chosen": " three", "rejected": " nine"}] * 8
UNBALANCED = {"lora": {}, "mixlora": {"router_aux_loss_coef": 0}}  # no loss that TRL's own loop would leave out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.model_folder(tmp_path_factory.mktemp("tiny"))


def base(folder: Path) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(folder)


def config(recipe: str, **options: Any) -> Any:
    return molora.peft_config(recipe, **{**tiny.SMALL[recipe], **options})


def trainer(own: Any, settings: Any, model: Any, rows: Any, folder: Path, out: Path, **more: Any) -> Any:
    arguments = settings(
        output_dir=str(out), max_steps=2, learning_rate=0.05, logging_steps=1, max_length=32, save_steps=2,
        per_device_train_batch_size=2, **QUIET,
    )  # fmt: skip
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    data = datasets.Dataset.from_list(rows)
    return own(model, args=arguments, train_dataset=data, processing_class=tokenizer, **more)


@pytest.mark.parametrize("recipe", having(lambda t: not t.imported))
def test_moloras_sft_trainer_takes_a_peft_config(recipe: str, folder: Path, tmp_path: Path) -> None:
    """It trains what ``convert`` would make of the same options, balance loss included."""
    runs = [
        trainer(SFTTrainer, trl.SFTConfig, base(folder), ROWS, folder, tmp_path / "a", peft_config=config(recipe)),
        trainer(
            SFTTrainer,
            trl.SFTConfig,
            molora.convert(base(folder), recipe, **tiny.SMALL[recipe]),
            ROWS,
            folder,
            tmp_path / "b",
        ),
    ]
    for it in runs:
        it.train()
    assert torch.equal(logged(runs[0], "loss"), logged(runs[1], "loss"))
    first, second = (state(it.model) for it in runs)
    assert all(torch.equal(first[n], second[n]) for n in second)
    loaded = peft.PeftModel.from_pretrained(base(folder), tmp_path / "a" / "checkpoint-2")
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    assert torch.equal(tiny.output(loaded.eval(), inputs), tiny.output(runs[0].model.eval(), inputs))


def test_trls_sft_trainer_takes_a_peft_config_where_nothing_would_be_lost(folder: Path, tmp_path: Path) -> None:
    for recipe, options in UNBALANCED.items():
        given = config(recipe, **options)
        it = trainer(trl.SFTTrainer, trl.SFTConfig, base(folder), ROWS, folder, tmp_path / recipe, peft_config=given)
        it.train()
        assert isinstance(it.model, peft.PeftModel)
        assert logged(it, "loss")[1] < logged(it, "loss")[0]
        loaded = molora.load(base(folder), tmp_path / recipe / "checkpoint-2").eval()
        inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
        assert torch.equal(tiny.output(loaded, inputs), tiny.output(it.model.eval(), inputs))
    given = config("mola")
    it = trainer(trl.SFTTrainer, trl.SFTConfig, base(folder), ROWS, folder, tmp_path, peft_config=given)
    with pytest.raises(MoloraError, match=r"for TRL molora\.training\.sft\.SFTTrainer"):
        it.train()


@pytest.mark.parametrize("recipe", UNBALANCED)
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_dpo_by_trl_compares_with_the_model_before_it(recipe: str, trained: bool, folder: Path, tmp_path: Path) -> None:
    """The reference is the base for a new adapter, a frozen copy "ref" of a trained one: either way the first loss of
    DPO, ``-log sigmoid(0)``, is log 2, and the reference's output stays what it was."""
    given, model = config(recipe, **UNBALANCED[recipe]), base(folder)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8]])}
    if trained:
        model = peft.get_peft_model(model, given)
        tiny.arm(model.get_base_model())
    before = tiny.output(model.eval(), inputs)
    more = {} if trained else {"peft_config": given}
    it = trainer(trl.DPOTrainer, trl.DPOConfig, model, PAIRS, folder, tmp_path, **more)
    it.train()
    losses = logged(it, "loss")
    assert math.isclose(float(losses[0]), math.log(2), rel_tol=1e-4)
    assert losses[1] < losses[0]
    inner = it.model
    assert sorted(inner.peft_config) == (["default", "ref"] if trained else ["default"])
    assert inner.active_adapter == "default"
    after = tiny.output(inner.eval(), inputs)
    assert not torch.equal(after, before)
    if trained:
        inner.set_adapter("ref")
        assert torch.equal(tiny.output(inner, inputs), before)
    else:
        with inner.disable_adapter():
            assert torch.equal(tiny.output(inner, inputs), before)


def test_sft_needs_the_model_itself(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="load it first"):
        trainer(SFTTrainer, trl.SFTConfig, str(folder), ROWS, folder, tmp_path, peft_config=config("mola"))
