"""EVA: experts start from the directions in which the data of the task vary."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from molora.errors import ConfigError, MoloraError
from molora.extras import FAULTS, need
from molora.initialisers.from_data import Batches, bank_of, fresh_sites
from molora.initialisers.from_weight import dealt

__all__ = ["init_eva"]


class _Limited:
    """The batches over and over, up to a limit: PEFT would go on until every component has settled."""

    def __init__(self, batches: Batches, limit: int) -> None:
        self.batches, self.limit = batches, limit

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        done = 0
        while done < self.limit:
            for batch in self.batches:
                done += 1
                yield batch
        raise ConfigError(
            f"init_eva: got components that still change after {done} batches, expected them to settle; give larger "
            "batches (each needs more tokens than a linear's experts have ranks in all), fewer ranks, or a lower tau"
        )


def init_eva(
    model: nn.Module, dataloader: Batches, *, tau: float = 0.99, max_batches: int = 1000, **options: Any
) -> None:
    """Start the trainable experts from the data (EVA, Paischer et al. 2024, arXiv 2410.07170), right after ``convert``.

    PEFT's incremental SVD of each linear's inputs, in the base model, gives the R directions of most variance, R = the
    ranks of all its experts; they are dealt to the experts in turn as the rows of A, orthonormal within a linear. B
    stays zero, so the model still computes what the base does. With one expert it is PEFT's EVA without moving ranks
    between layers (``rho=1``). The base's weights and hooks are not touched.

    Args:
        model: a converted model that was not trained yet.
        dataloader: batches of keyword arguments for the model, each with more tokens than R.
        tau: the cosine between a component before and after a batch from which on it counts as settled.
        max_batches: how many batches to see at most.
        options: for ``peft.get_eva_state_dict``, such as ``prepare_layer_inputs_fn`` for inputs that are no text.

    Raises:
        ConfigError: for a model without trainable experts or with trained ones, too many ranks for a linear's width,
            data that do not settle, or anything that PEFT raises; the experts are then as they were.
    """
    sites = fresh_sites(model, "init_eva")
    rank = max(sum(bank_of(m).ranks) for m in sites.values())
    narrow = {p: m.in_features for p, m in sites.items() if m.in_features < rank}
    if narrow:
        path = min(narrow, key=lambda p: narrow[p])
        raise ConfigError(
            f"init_eva: got experts of {rank} ranks in all on a linear, expected at most {narrow[path]}, the width of "
            f"{path}'s input"
        )
    components = _components(model, list(sites), rank, _Limited(dataloader, max_batches), tau, options)
    with torch.no_grad():
        for path, m in sites.items():
            bank = bank_of(m)
            for e, picks in enumerate(dealt(bank.ranks)):
                bank.lora_A[bank.span(e)] = components[path][picks].to(bank.lora_A)


def _components(
    model: nn.Module, paths: list[str], rank: int, batches: _Limited, tau: float, options: dict[str, Any]
) -> dict[str, Any]:
    """(rank, I) directions by path, from a copy of the model that shares its tensors, so that no hook stays behind."""
    peft = need("peft", "peft", "init_eva")
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin: Any = copy.deepcopy(model, dict(shared)).eval()
    try:
        config = peft.LoraConfig(
            r=rank,
            init_lora_weights="eva",
            target_modules=[f"{p}.base_layer" for p in paths],
            eva_config=peft.EvaConfig(rho=1.0, tau=tau),
        )
        with twin.disable_adapter():
            found = peft.get_eva_state_dict(
                twin, batches, peft_config=config, **{"show_progress_bar": False, **options}
            )
    except MoloraError:
        raise
    except FAULTS as e:
        raise ConfigError(f"init_eva: PEFT's EVA cannot use these batches ({type(e).__name__}: {str(e)[:300]})") from e
    return {p: found[f"{p}.base_layer"] for p in paths}
