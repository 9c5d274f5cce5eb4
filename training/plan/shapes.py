"""Base models without storage: from a folder's config, or from the shapes of published models in ``configs/shapes``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from molora.errors import ConfigError, nearest
from molora.training.arguments import ModelArguments
from molora.training.models import CLASSES, DTYPES

__all__ = ["SHAPES", "base_without_storage", "known_shapes"]

SHAPES = Path(__file__).parents[1] / "configs" / "shapes"  # <owner>--<name>.json: the config fields that set a shape
BUILTIN_SHAPES = {"builtin:smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct"}


def known_shapes() -> list[str]:
    """The published models whose shapes come with the package, by their names on the Hugging Face hub."""
    return sorted(path.stem.replace("--", "/") for path in SHAPES.glob("*.json"))


def base_without_storage(arguments: ModelArguments) -> PreTrainedModel:
    """The base on the meta device, in its dtype: from ``config.json`` of a model folder, else from the known shapes.

    Raises:
        ConfigError: unknown dtype; a name that is neither a model folder nor a model of known shapes; a config that
            is no language model's.
    """
    if arguments.dtype not in DTYPES:
        raise ConfigError(f"dtype: got {arguments.dtype!r}, expected one of {', '.join(DTYPES)}")
    name = arguments.model_name_or_path
    config = _config(name)
    pairs: tuple[tuple[Any, Any], ...] = (
        (MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForImageTextToText),
    )
    if arguments.model_task == CLASSES:
        pairs = ((MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoModelForSequenceClassification),)
    for mapping, auto in pairs:
        if type(config) in mapping:
            with torch.device("meta"):
                model: PreTrainedModel = auto.from_config(config, dtype=DTYPES[arguments.dtype])
            return model
    raise ConfigError(f"model: {name} is a {config.model_type!r}, expected a causal or a vision-language model")


def _config(name: str) -> PreTrainedConfig:
    folder, known = Path(name), known_shapes()
    if (folder / "config.json").is_file():
        try:
            found: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        except (OSError, ValueError) as e:
            raise ConfigError(f"model: {folder}/config.json cannot be read: {e}") from e
        return found
    published = BUILTIN_SHAPES.get(name, name)
    if published not in known:
        raise ConfigError(
            f"model: got {name!r}, expected a folder with a config.json (the weights are not needed for a dry run), or "
            f"one of: {', '.join([*BUILTIN_SHAPES, *known])}{nearest(name, known)}"
        )
    values = json.loads((SHAPES / f"{published.replace('/', '--')}.json").read_text(encoding="utf-8"))
    shapes: PreTrainedConfig = AutoConfig.for_model(**values)
    return shapes
