"""CorDA: experts start from the weight's directions, ordered by what the data make of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import ConfigError, MoloraError
from molora.extras import FAULTS, need
from molora.initialisers.from_data import Batches, bank_of, check_weights, fresh_sites, on_device, shared_copy, take
from molora.initialisers.from_weight import peft_start, readable_weight
from molora.layers.linear import MixtureLinear
from molora.seeds import generator

__all__ = ["init_corda"]

WHAT = "init_corda"
METHODS = ("ipm", "kpm")


def init_corda(model: nn.Module, dataloader: Batches, *, corda_method: str = "ipm") -> None:
    """Start the trainable experts from weights and data (CorDA, Yang et al. 2024, arXiv 2406.05223), after ``convert``.

    PEFT's preparation takes the covariance C of each adapted linear's inputs, in the base model, and decomposes
    ``W C = U S V^T``. ``B0 A0`` is the part ``U S V^T C^-1`` of the R largest singular values (``"ipm"``: what the
    data's task uses) or of the R smallest (``"kpm"``: to keep what the data know), R = the ranks of all experts of a
    linear; the directions are dealt to the experts in turn. Each expert takes its own start back under its own gate,
    ``g s (B A - B0 A0) x``, by as many frozen ranks again: the model still computes what the base does, and the base's
    weights and hooks are not touched. With one expert it is PEFT's CorDA.

    What is saved holds the start: go on from it with ``molora.load(base, folder, trainable=True)``.

    Args:
        model: a converted model that was not trained yet, on a base that is neither quantised nor sharded.
        dataloader: batches of keyword arguments for the model, each one row without padding, as PEFT takes them;
            several hundred rows of full length for a large model (PEFT's advice).
        corda_method: ``"ipm"`` or ``"kpm"``.

    Raises:
        ConfigError: for a model without trainable experts or with trained ones, more ranks than a linear is wide,
            batches of several rows or none, or anything that PEFT raises; the experts are then as they were.
    """
    if corda_method not in METHODS:
        raise ConfigError(f"{WHAT}: corda_method: got {corda_method!r}, expected one of {', '.join(METHODS)}")
    sites = fresh_sites(model, WHAT)
    rank = max(sum(bank_of(m).ranks) for m in sites.values())
    check_weights(sites, dict.fromkeys(sites, rank), WHAT)
    peft = need("peft", "peft", WHAT)
    from peft.tuners.lora.config import CordaConfig

    config = CordaConfig(corda_method=corda_method)  # type: ignore[arg-type]
    try:
        eigens = _eigens(peft, model, sites, dataloader, rank, config)
        starts = {p: _start(config, m, eigens[p]) for p, m in sites.items()}
    except MoloraError:
        raise
    except FAULTS as e:
        raise ConfigError(f"{WHAT}: PEFT cannot use these batches ({type(e).__name__}: {str(e)[:300]})") from e
    take(model, starts)


def _eigens(
    peft: Any, model: nn.Module, sites: dict[str, MixtureLinear], batches: Batches, rank: int, corda: Any
) -> dict[str, Any]:
    """PEFT's decompositions to ``rank`` by path, made on a copy of the model that shares its tensors."""
    from peft.tuners.lora.corda import preprocess_corda

    twin: Any = shared_copy(model)
    config = peft.LoraConfig(
        r=rank, init_lora_weights="corda", target_modules=[f"{p}.base_layer" for p in sites], corda_config=corda
    )

    def run() -> None:
        if not len(batches):
            raise ConfigError(f"{WHAT}: got no batches, expected some")
        for batch in batches:
            _check_row(batch)
            twin(**on_device(batch, twin))

    with twin.disable_adapter():
        preprocess_corda(twin, config, run_model=run)
    return {p: twin.get_submodule(f"{p}.base_layer").eigens for p in sites}


def _check_row(batch: Any) -> None:
    several = [k for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 1 and len(v) != 1]
    mask = batch.get("attention_mask")
    if several or (mask is not None and not bool(mask.all())):
        got = f"several rows in {several[0]!r}" if several else "a row with padding"
        raise ConfigError(f"{WHAT}: got {got}, expected batches of one row without padding (batch_size=1)")


def _start(config: Any, m: MixtureLinear, eigens: Any) -> tuple[Tensor, Tensor]:
    """The R largest of the first singular values, or the R smallest of the last, as PEFT crops them."""
    bank = bank_of(m)
    R, own = sum(bank.ranks), copy.copy(eigens)
    part = slice(R) if config.corda_method == "ipm" else slice(-R, None)
    own.S_WC, own.U_WC, own.V_WC = own.S_WC[part].clone(), own.U_WC[:, part], own.V_WC[:, part]
    with torch.no_grad():
        weight_OI = readable_weight(m, R, WHAT)
        return peft_start(
            *("corda", weight_OI, R, generator(0)), scale=bank.scales[0], found={"eigens": own}, corda_config=config
        )
