"""LoRA-GA: experts start along the gradient that full fine-tuning would follow."""

from __future__ import annotations

import typing
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import ConfigError, MoloraError
from molora.extras import FAULTS, need
from molora.initialisers.from_data import Batches, bank_of, check_weights, fresh_sites, on_device, shared_copy, take
from molora.initialisers.from_weight import peft_start, readable_weight
from molora.layers.linear import MixtureLinear
from molora.seeds import generator

__all__ = ["init_lora_ga"]

WHAT = "init_lora_ga"
DIRECTIONS = 2  # of the gradient for each rank: one for A, one for B


def init_lora_ga(model: nn.Module, dataloader: Batches, *, seed: int = 0, **options: Any) -> None:
    """Start the trainable experts from gradients (LoRA-GA, Wang et al. 2024, arXiv 2407.05000), after ``convert``.

    PEFT's preparation takes the mean gradient of each adapted weight over the batches, in the base model, and its start
    makes A and B of the gradient's 2 R first singular directions, R = the ranks of all experts of a linear; they are
    dealt to the experts in turn. Each expert takes its own start back under its own gate, ``g s (B A - B0 A0) x``, by
    as many frozen ranks again: the model still computes what the base does, and the base's weights, gradients, flags
    and hooks are not touched. With one expert it is PEFT's LoRA-GA. All gradients are in memory at once.

    What is saved holds the start: go on from it with ``molora.load(base, folder, trainable=True)``.

    Args:
        model: a converted model that was not trained yet, on a base that is neither quantised nor sharded.
        dataloader: batches of keyword arguments for the model, with labels, so that it returns a loss.
        seed: for PEFT's approximate decomposition.
        options: of ``peft.LoraGAConfig``: ``direction``, ``scale``, ``stable_gamma``.

    Raises:
        ConfigError: for a model without trainable experts or with trained ones, experts of more than half as many ranks
            as a linear is wide, batches that give a linear no gradient, or anything that PEFT raises; the experts are
            then as they were.
    """
    sites = fresh_sites(model, WHAT)
    check_weights(sites, {p: sum(bank_of(m).ranks) for p, m in sites.items()}, WHAT, DIRECTIONS)
    peft = need("peft", "peft", WHAT)
    _check(options, typing.get_type_hints(peft.LoraGAConfig))
    try:
        config = peft.LoraGAConfig(**options)
        gradients = _gradients(peft, model, sites, dataloader)
        starts = {p: _start(config, m, gradients[p], generator(seed, p)) for p, m in sites.items()}
    except MoloraError:
        raise
    except FAULTS as e:
        raise ConfigError(f"{WHAT}: PEFT cannot use this ({type(e).__name__}: {str(e)[:300]})") from e
    take(model, starts)


def _check(options: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """PEFT takes any value and stumbles over it later, or does as if there were none."""
    for name, value in options.items():
        if name not in known:
            raise ConfigError(f"{WHAT}: got the option {name!r}, expected one of {', '.join(known)}")
        choices = typing.get_args(known[name])
        if choices and value not in choices:
            raise ConfigError(f"{WHAT}: {name}: got {value!r}, expected one of {', '.join(choices)}")


def _gradients(peft: Any, model: nn.Module, sites: dict[str, MixtureLinear], batches: Batches) -> dict[str, Tensor]:
    """The mean gradient (O, I) of each site's weight, on a copy of the model that shares its tensors."""
    twin: Any = shared_copy(model)
    config = peft.LoraConfig(
        init_lora_weights="lora_ga",
        target_modules=[f"{p}.base_layer" for p in sites],
        lora_ga_config=peft.LoraGAConfig(),
    )

    def step() -> None:
        for batch in batches:
            loss = twin(**on_device(batch, twin)).loss
            if loss is None:
                raise ConfigError(f"{WHAT}: the model returned no loss, expected batches with labels")
            loss.backward()

    with twin.disable_adapter(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook")  # PEFT's counters, on linears that read embeddings
        peft.preprocess_loraga(twin, config, step)
    out = {}
    for path in sites:
        layer = twin.get_submodule(f"{path}.base_layer")
        gradient = getattr(layer, "_peft_loraga_grad", None)
        if gradient is None or not bool(torch.isfinite(gradient).all()) or not bool(gradient.any()):
            raise ConfigError(
                f"{WHAT}: {path} got no gradient, or one that is not finite, from these batches, expected finite values"
            )
        out[path] = gradient if isinstance(layer, nn.Linear) else gradient.T
    return out


def _start(config: Any, m: MixtureLinear, gradient_OI: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    bank = bank_of(m)
    R, weight_OI = sum(bank.ranks), readable_weight(m, sum(bank.ranks), WHAT)
    found = {"_peft_loraga_grad": gradient_OI}
    with torch.no_grad():
        return peft_start("lora_ga", weight_OI, R, rng, scale=bank.scales[0], found=found, lora_ga_config=config)
