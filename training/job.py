"""The training job: arguments -> data, base, mixture -> Trainer -> adapter folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainingArguments, set_seed

from molora.config import MoloraConfig
from molora.convert import convert
from molora.data.builtin.model import model_folder
from molora.data.examples import Collator
from molora.data.packing import check_packing
from molora.errors import ConfigError, nearest
from molora.recipes import RECIPES
from molora.training.arguments import OUTPUT, Arguments, MixtureArguments
from molora.training.engine.line import EngineLine
from molora.training.models import (
    CLASSES,
    IMAGES,
    known_labels,
    load_base,
    load_classifier,
    load_processor,
    load_tokenizer,
    task_of,
    with_trained_head,
)
from molora.training.rows import Data, prepare_data, supervised_experts
from molora.training.trainer import Trainer

__all__ = ["Data", "Trained", "load_base", "load_tokenizer", "mixture", "prepare_data", "recipe_config", "run", "train"]


@dataclass(frozen=True)
class Trained:
    """A finished run: the converted model, what it learned from, and the Trainer's log.

    ``interrupted``: somebody ended it early; its newest checkpoint is where it stopped.
    """

    model: PreTrainedModel
    tokenizer: Any
    data: Data
    log: list[dict[str, float]]
    seconds: float
    folder: Path
    interrupted: bool = False


def recipe_config(arguments: MixtureArguments) -> MoloraConfig:
    """The recipe with its options, checked before anything is loaded.

    Raises:
        ConfigError: unknown recipe or option, or values that cannot work.
    """
    if arguments.recipe not in RECIPES:
        known = ", ".join(RECIPES)
        raise ConfigError(
            f"recipe: got {arguments.recipe!r}, expected one of {known}{nearest(arguments.recipe, RECIPES)}"
        )
    return RECIPES[arguments.recipe](**arguments.options)


def run(arguments: Arguments, tell: Callable[[Data], None] = lambda _: None) -> Trained:
    """Train one mixture and save its adapter folder to ``output_dir``; ``tell`` gets the data before training starts.

    Held-out loss per domain is logged when ``eval_strategy`` asks for it, as ``eval_<domain>_loss``.
    """
    settings, config, task = arguments.training, recipe_config(arguments.mixture), task_of(arguments.model)
    experts = supervised_experts(config, arguments.data)
    with settings.main_process_first():  # on each machine one process makes the copy of a built-in base
        model_folder(arguments.model.model_name_or_path)
    tokenizer = load_tokenizer(arguments.model)
    encoder = load_processor(arguments.model) if task == IMAGES else tokenizer
    known = known_labels(arguments.model) if task == CLASSES else ()
    data = prepare_data(arguments.data, encoder, settings.seed, task, experts, known)
    tell(data)
    trained = train(mixture(arguments, data, tokenizer), tokenizer, data, settings)
    if task == CLASSES and settings.should_save:
        trained.model.config.save_pretrained(trained.folder)  # the names of the classes
    return trained


def mixture(arguments: Arguments, data: Data, tokenizer: Any) -> PreTrainedModel:
    """The base with the recipe on it; a classifier's new head trains with it.

    Raises:
        ConfigError: a base or an option that cannot work, or packing with a base that cannot keep texts apart.
    """
    config, seed = recipe_config(arguments.mixture), arguments.training.seed
    if task_of(arguments.model) == CLASSES:
        set_seed(seed)  # a new head is drawn now
        base, fresh = load_classifier(arguments.model, data.labels, tokenizer.pad_token_id)
        config = with_trained_head(config, fresh)
    else:
        base = load_base(arguments.model)
    if arguments.data.packing:
        check_packing(base, config)
    return convert(base, config, seed=seed)


def train(model: PreTrainedModel, tokenizer: Any, data: Data, settings: TrainingArguments) -> Trained:
    """Train a converted model and save its adapter folder."""
    set_seed(settings.seed)
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=data.train,
        eval_dataset=data.heldout,
        data_collator=Collator(tokenizer.pad_token_id or 0),
        processing_class=tokenizer,
    )
    trainer.add_callback(EngineLine(trainer))
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=settings.resume_from_checkpoint)
    seconds = time.perf_counter() - started
    folder = Path(settings.output_dir or OUTPUT)
    trainer.save_adapter(folder)
    log = trainer.state.log_history
    if trainer.is_world_process_zero():
        (folder / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")
    return Trained(model, tokenizer, data, log, seconds, folder, trainer.interrupt.interrupted)
