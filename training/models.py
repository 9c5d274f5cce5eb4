"""The base of a training job by kind: causal language model, text classifier, or vision-language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from molora.config import MoloraConfig
from molora.data.builtin.model import model_folder, quiet_loading
from molora.errors import ConfigError, nearest
from molora.extras import missing
from molora.training.arguments import ModelArguments

__all__ = ["CAUSAL", "CLASSES", "IMAGES", "known_labels", "load_base", "load_classifier", "load_processor"]
__all__ += ["load_tokenizer", "task_of", "with_trained_head"]

CAUSAL, CLASSES, IMAGES = "causal-lm", "sequence-classification", "image-text-to-text"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"model: {folder} cannot be loaded: config.json: {e}") from e
    return values if isinstance(values, dict) else {}


def _classes(table: str) -> set[str]:
    names = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").values()
    return {name for value in names for name in (value if isinstance(value, tuple | list) else (value,))}


def task_of(arguments: ModelArguments) -> str:
    """``model_task``, read from the folder's ``architectures`` where it is ``auto``: what is no classifier and needs no
    image processor is a causal language model.

    Raises:
        ConfigError: an unknown task, or a folder without a readable config.
    """
    task = arguments.model_task
    known = ("auto", CAUSAL, CLASSES, IMAGES)
    if task not in known:
        raise ConfigError(f"model_task: got {task!r}, expected one of {', '.join(known)}{nearest(task, known)}")
    if task != "auto":
        return task
    folder = model_folder(arguments.model_name_or_path)
    built = set(_config(folder).get("architectures") or ())
    if built & _classes("SEQUENCE_CLASSIFICATION"):
        return CLASSES
    sees = any((folder / f"{name}_config.json").is_file() for name in ("processor", "preprocessor"))
    only_images = built & (_classes("IMAGE_TEXT_TO_TEXT") - _classes("CAUSAL_LM"))
    return IMAGES if only_images or (sees and built & _classes("IMAGE_TEXT_TO_TEXT")) else CAUSAL


def load_tokenizer(arguments: ModelArguments) -> Any:
    """The base's tokenizer, set to pad on the left as generation needs (training pads by itself)."""
    folder = model_folder(arguments.model_name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except (OSError, ValueError) as e:
        raise ConfigError(f"model: the tokenizer in {folder} cannot be loaded: {e}") from e
    if tokenizer.pad_token_id is None and task_of(arguments) == CLASSES:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"model: the tokenizer in {folder} has no padding and no end token; add one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(arguments: ModelArguments) -> Any:
    """A vision-language model's processor: its tokenizer, and what makes tensors of images."""
    folder = model_folder(arguments.model_name_or_path)
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except ImportError as e:
        raise missing(f"pillow ({e})", "train", f"model: the image processor in {folder}") from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"model: the processor in {folder} cannot be loaded: {e}") from e
    if not hasattr(processor, "tokenizer"):
        raise ConfigError(
            f"model: {folder} has no image processor (processor_config.json); model_task: {CAUSAL} needs none"
        )
    return processor


def _load(arguments: ModelArguments, auto: Any, **more: Any) -> Any:
    if arguments.dtype not in DTYPES:
        raise ConfigError(f"dtype: got {arguments.dtype!r}, expected one of {', '.join(DTYPES)}")
    folder = model_folder(arguments.model_name_or_path)
    try:
        with quiet_loading():
            return auto.from_pretrained(folder, dtype=DTYPES[arguments.dtype], **more)
    except (OSError, ValueError, RuntimeError) as e:
        raise ConfigError(f"model: {folder} cannot be loaded: {e}") from e


def load_base(arguments: ModelArguments) -> PreTrainedModel:
    """The base in its dtype; a classifier comes from :func:`load_classifier`.

    Raises:
        ConfigError: unknown dtype, or a folder that transformers cannot load as a model of this kind.
    """
    auto = AutoModelForImageTextToText if task_of(arguments) == IMAGES else AutoModelForCausalLM
    model: PreTrainedModel = _load(arguments, auto)
    return model


def known_labels(arguments: ModelArguments) -> tuple[str, ...]:
    """The classes of a folder that is a classifier already, in the order of its outputs; else nothing."""
    values = _config(model_folder(arguments.model_name_or_path))
    if not set(values.get("architectures") or ()) & _classes("SEQUENCE_CLASSIFICATION"):
        return ()
    names = values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves the default of two out
    return tuple(str(names[i]) for i in sorted(names, key=int))


def load_classifier(
    arguments: ModelArguments, labels: Sequence[str], pad_token_id: int
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """A classifier of ``labels``, and the paths of its modules that the folder has no weights for: the new head.

    A new head is drawn from torch's global random state.
    """
    names = dict(enumerate(labels))
    own: dict[str, Any] = (
        {} if known_labels(arguments) else {"id2label": names, "label2id": {n: i for i, n in names.items()}}
    )
    model, found = _load(arguments, AutoModelForSequenceClassification, output_loading_info=True, **own)
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = model.config.pad_token_id = pad_token_id
    return model, tuple(dict.fromkeys(key.rpartition(".")[0] for key in sorted(found["missing_keys"])))


def with_trained_head(config: MoloraConfig, fresh: Sequence[str]) -> MoloraConfig:
    """The mixture with ``fresh`` modules trained and saved whole (``modules_to_save``): frozen noise says nothing."""
    more = tuple(f for f in fresh if not any(f == m or f.endswith("." + m) for m in config.modules_to_save))
    return replace(config, modules_to_save=(*config.modules_to_save, *more))
