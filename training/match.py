"""Give two mixtures about the same number of trainable parameters."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from molora.config import MoloraConfig
from molora.convert import convert
from molora.data.builtin.model import model_folder
from molora.errors import ConfigError
from molora.training.arguments import Arguments, ModelArguments
from molora.training.job import recipe_config

__all__ = ["matched", "trainable_parameters"]


def trainable_parameters(model: ModelArguments, config: MoloraConfig) -> int:
    """Trainable parameters of a config on a base, counted on the meta device: no weights are read."""
    base_config = AutoConfig.from_pretrained(model_folder(model.model_name_or_path))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(base_config)
    return int(convert(base, config).get_nb_trainable_parameters()[0])


def matched(arguments: Arguments, reference: Arguments) -> Arguments:
    """``arguments`` with the rank whose number of trainable parameters comes closest to that of ``reference``.

    ``lora_alpha`` moves with the rank, so that their ratio, the scale, stays. Only for a config of single experts:
    with several, there is more than one way to the same size, and the config stays as it is.
    """
    config = recipe_config(arguments.mixture)
    if any(p.num_experts != 1 or p.rank_one or not isinstance(p.r, int) for p in config.placements):
        return arguments
    target = trainable_parameters(reference.model, recipe_config(reference.mixture))
    given = config.placements[0]
    one = recipe_config(replace(arguments.mixture, options={**arguments.mixture.options, "r": 1}))
    per_rank = trainable_parameters(arguments.model, one)
    if target < per_rank:
        raise ConfigError(
            f"{arguments.mixture.recipe}: rank 1 has {per_rank:,} trainable parameters, more than the {target:,} of "
            f"{reference.mixture.recipe}; give that one more ranks or experts"
        )
    rank = round(target / per_rank)
    sized = {"r": rank, "lora_alpha": given.lora_alpha * rank / int(given.r if isinstance(given.r, int) else 1)}
    return replace(arguments, mixture=replace(arguments.mixture, options={**arguments.mixture.options, **sized}))
