"""EVA: experts start from the directions in which the data of the task vary."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sized
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.errors import ConfigError, MoloraError
from molora.fused import FusedParameter
from molora.interop.initialisers import dealt
from molora.interop.installed import installed_peft
from molora.interop.merged import FAULTS
from molora.layers import MixtureLinear
from molora.model import MixtureModel

__all__ = ["Batches", "init_eva"]


class Batches(Sized, Protocol):
    """Batches of the model's keyword arguments, which can be gone through again and again: a DataLoader or a list."""

    def __iter__(self) -> Iterator[Any]: ...


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
    sites = _fresh(model)
    rank = max(sum(_ranks(m)) for m in sites.values())
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
            bank = cast(Any, m.bank)
            for e, picks in enumerate(dealt(bank.ranks)):
                bank.lora_A[bank.span(e)] = components[path][picks].to(bank.lora_A)


def _ranks(m: MixtureLinear) -> tuple[int, ...]:
    return cast(Any, m.bank).ranks  # type: ignore[no-any-return]


def _fresh(model: nn.Module) -> dict[str, MixtureLinear]:
    """The sites with trainable experts, whose B has to be zero still."""
    if not isinstance(model, MixtureModel):
        raise ConfigError("init_eva: got a plain model, expected a converted one; call molora.convert first")
    out = {}
    for path, m in model.named_modules():
        if isinstance(m, FusedParameter):
            raise ConfigError(
                f"init_eva: {m.site.path} is no linear with an input that PEFT could look at; expected a "
                "mixture without target_parameters"
            )
        bank = m.bank if isinstance(m, MixtureLinear) else None
        if bank is None or not bank.lora_A.requires_grad or not sum(bank.ranks):
            continue
        if not isinstance(m.base_layer, nn.Linear | Conv1D):
            raise ConfigError(f"init_eva: {path} is a {type(m.base_layer).__name__}, expected a linear that PEFT knows")
        if bool(bank.lora_B.any()):
            raise ConfigError(
                f"init_eva: {path} has experts whose B is not zero: trained, or of another start; expected a model "
                "fresh from convert with init_lora_weights=True"
            )
        out[path] = m
    if not out:
        raise ConfigError("init_eva: got a model without trainable experts, expected some to start")
    return out


def _components(
    model: nn.Module, paths: list[str], rank: int, batches: _Limited, tau: float, options: dict[str, Any]
) -> dict[str, Any]:
    """(rank, I) directions by path, from a copy of the model that shares its tensors, so that no hook stays behind."""
    peft = installed_peft("init_eva")
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
