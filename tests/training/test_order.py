"""Training rows come in one order: for the same arguments always, and after a resume as if there had been none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers as tf

from molora.data.examples import Collator
from molora.training.arguments import DataArguments
from molora.training.order import grouped_by_length
from molora.training.rows import Data, prepare_data
from tests.support import tiny_text

STEPS = 10  # of 8 rows, in an epoch


class Ordered(tf.Trainer):
    """A Trainer with the sampler of ours where there is one."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return grouped_by_length(self.args, rows) or super()._get_train_sampler(train_dataset)


def data(folder: Path) -> Data:
    return prepare_data(DataArguments(tiny_text.domains(folder), max_length=48), tiny_text.tokenizer(), 0)


def seen(folder: Path, out: str, strategy: str, resume: str | None = None, **more: Any) -> list[list[list[int]]]:
    """Token ids of every batch that a model gets in two epochs."""
    model = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
            vocab_size=len(tiny_text.tokenizer()),
        )
    )  # fmt: skip
    batches: list[list[list[int]]] = []
    model.register_forward_pre_hook(lambda _, __, kw: batches.append(kw["input_ids"].tolist()), with_kwargs=True)
    settings = tf.TrainingArguments(
        str(folder / out), num_train_epochs=2, per_device_train_batch_size=8, train_sampling_strategy=strategy,
        save_steps=3, disable_tqdm=True, use_cpu=True, report_to=[], **more,
    )  # fmt: skip
    trainer = Ordered(model, settings, train_dataset=data(folder).train, data_collator=Collator())
    trainer.train(resume_from_checkpoint=resume)
    return batches


def test_rows_depend_on_arguments_alone(tmp_path: Path) -> None:
    assert data(tmp_path).train == data(tmp_path).train
    assert (
        data(tmp_path).train
        != prepare_data(DataArguments(tiny_text.domains(tmp_path), max_length=48), tiny_text.tokenizer(), 1).train
    )


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_resumed_run_sees_what_the_other_would_have_seen(tmp_path: Path, strategy: str) -> None:
    whole = seen(tmp_path, "whole", strategy)
    assert len(whole) == 2 * STEPS
    assert whole[:STEPS] != whole[STEPS:]
    for step in (3, 15):  # in the first epoch, and in the middle of the second
        rest = seen(tmp_path, "again", strategy, resume=str(tmp_path / f"whole/checkpoint-{step}"))
        assert rest == whole[step:]


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_the_data_seed_changes_the_order_of_the_same_rows(tmp_path: Path, strategy: str) -> None:
    one, two = (seen(tmp_path, "out", strategy, data_seed=s, max_steps=STEPS) for s in (1, 2))
    assert one != two

    def rows(batches: list[list[list[int]]]) -> list[str]:
        return sorted(tiny_text.tokenizer().decode(row).rstrip("!") for batch in batches for row in batch)  # ! is 0

    assert rows(one) == rows(two)
