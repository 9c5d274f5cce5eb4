"""The training job: arguments -> data, base, mixture -> transformers' own Trainer -> adapter folder."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Trainer, TrainingArguments, set_seed

from molora.config import MoloraConfig
from molora.convert import convert
from molora.data import Collator, Example, Record, apart, encode, split
from molora.errors import ConfigError, nearest
from molora.recipes import RECIPES
from molora.training.arguments import OUTPUT, Arguments, DataArguments, MixtureArguments, ModelArguments
from molora.training.demo_data import domain_records
from molora.training.demo_model import model_folder, quiet_loading
from molora.training.mixing import mix
from molora.training.processes import EngineLine, gathered

__all__ = ["Data", "Trained", "load_base", "load_tokenizer", "prepare_data", "recipe_config", "run", "train"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class Data:
    """Rows to train on (all domains, shuffled) and, per domain, the held-out records and their rows."""

    train: list[Example]
    heldout: dict[str, list[Example]]
    heldout_records: dict[str, list[Record]]
    train_records: dict[str, int]


@dataclass(frozen=True)
class Trained:
    """A finished run: the converted model, what it learned from, and the Trainer's log."""

    model: PreTrainedModel
    tokenizer: Any
    data: Data
    log: list[dict[str, float]]
    seconds: float
    folder: Path


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The base's tokenizer, set to pad on the left as generation needs (training pads by itself)."""
    folder = model_folder(arguments.model_name_or_path)
    try:
        return AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError) as e:
        raise ConfigError(f"model: the tokenizer in {folder} cannot be loaded: {e}") from e


def load_base(arguments: ModelArguments) -> PreTrainedModel:
    """The base in its dtype.

    Raises:
        ConfigError: unknown dtype, or a folder that transformers cannot load as a causal language model.
    """
    if arguments.dtype not in DTYPES:
        raise ConfigError(f"dtype: got {arguments.dtype!r}, expected one of {', '.join(DTYPES)}")
    folder = model_folder(arguments.model_name_or_path)
    try:
        with quiet_loading():
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[arguments.dtype])
    except (OSError, ValueError) as e:
        raise ConfigError(f"model: {folder} cannot be loaded: {e}") from e
    return model


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


def prepare_data(arguments: DataArguments, tokenizer: Any, seed: int) -> Data:
    """Read, split and tokenise every domain, and mix the training rows. Depends on its arguments only.

    Raises:
        ConfigError: a file that is missing, bad or too small; a domain without a single usable row.
    """
    train: dict[str, list[Example]] = {}
    heldout: dict[str, list[Example]] = {}
    kept: dict[str, tuple[int, list[Record]]] = {}
    for name, source in arguments.domains.items():
        records = domain_records(source)
        own = arguments.heldout_domains.get(name)
        learn, held = apart(records, domain_records(own)) if own else split(records, arguments.heldout, seed)
        train[name] = [row for r in learn for row in encode(r, tokenizer, arguments.max_length)]
        heldout[name] = [row for r in held for row in encode(r, tokenizer, arguments.max_length)]
        kept[name] = len(learn), held
        if not train[name] or not heldout[name]:
            side = "held-out" if train[name] else "training"
            raise ConfigError(
                f"domain {name!r} ({source}): no {side} row has a token to learn within {arguments.max_length} tokens; "
                "raise max_length"
            )
    rows = mix(train, arguments.weights, arguments.train_examples, seed)
    return Data(rows, heldout, {n: held for n, (_, held) in kept.items()}, {n: count for n, (count, _) in kept.items()})


def run(arguments: Arguments, tell: Callable[[Data], None] = lambda _: None) -> Trained:
    """Train one mixture and save its adapter folder to ``output_dir``; ``tell`` gets the data before training starts.

    Held-out loss per domain is logged when ``eval_strategy`` asks for it, as ``eval_<domain>_loss``.
    """
    settings, config = arguments.training, recipe_config(arguments.mixture)
    with settings.main_process_first():  # on each machine one process makes the copy of a built-in base
        model_folder(arguments.model.model_name_or_path)
    tokenizer = load_tokenizer(arguments.model)
    data = prepare_data(arguments.data, tokenizer, settings.seed)
    tell(data)
    model = convert(load_base(arguments.model), config, seed=settings.seed)
    return train(model, tokenizer, data, settings)


def train(model: PreTrainedModel, tokenizer: Any, data: Data, settings: TrainingArguments) -> Trained:
    """Train a converted model with transformers' Trainer and save its adapter folder."""
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
    with gathered(model):
        model.save_pretrained(folder, is_main_process=trainer.is_world_process_zero())
    log = trainer.state.log_history
    if trainer.is_world_process_zero():
        (folder / "train_log.json").write_text(json.dumps(log, indent=1) + "\n")
    return Trained(model, tokenizer, data, log, seconds, folder)
