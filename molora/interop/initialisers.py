"""Starts of experts that PEFT computes: its initialiser runs on a stand-in for the frozen linear.

Experts differ from the first step on: each has its own draw, or its own share of the singular vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.bank import ExpertBank
from molora.build import Built, generator
from molora.errors import ConfigError
from molora.interop.installed import installed_peft
from molora.interop.merged import linear_weight
from molora.layers import MixtureLinear

__all__ = ["STARTED_BY_PEFT", "dealt", "start_experts"]


def start_experts(built: Built, seed: int) -> None:
    """Start the banks whose placement asks for a start of PEFT; banks on the meta device hold nothing to start.

    Raises:
        ConfigError: for ranks or base weights that the start cannot be computed from; PEFT not installed.
    """
    for path, site in built.routed().items():
        if not isinstance(site, MixtureLinear) or site.bank is None:
            continue
        make = STARTED_BY_PEFT.get(site.placement.init_lora_weights)
        if make is not None and site.bank.lora_A.device.type != "meta":
            with torch.no_grad():
                make(site.bank, site.base_layer, path, seed)


def dealt(ranks: Sequence[int]) -> list[list[int]]:
    """Indices 0, 1, ... given to the experts in turn, each up to its rank: [2, 1] gives [[0, 2], [1]]."""
    out: list[list[int]] = [[] for _ in ranks]
    turns = [e for r in range(max(ranks, default=0)) for e, rank in enumerate(ranks) if r < rank]
    for i, e in enumerate(turns):
        out[e].append(i)
    return out


def _orthogonal(bank: ExpertBank, base: nn.Module, path: str, seed: int) -> None:
    """PEFT's orthogonal start, one draw for each expert.

    With Q a random orthogonal (r, r) matrix, ``A = (X Q_odd)^T / 10`` and ``B = Y Q_even / 10``, so ``B A = 0``. Ranks
    are even, as the config sees to.
    """
    stand_in = torch.zeros(bank.lora_B.shape[0], bank.lora_A.shape[1])
    for e, r in enumerate(bank.ranks):
        bank.set_expert(e, *_peft_start("orthogonal", stand_in, r, generator(seed, path, "orthogonal", str(e))))


def _mica(bank: ExpertBank, base: nn.Module, path: str, seed: int) -> None:
    """MiCA's start (arXiv 2604.01694): B the left singular vectors of the smallest singular values, A zero.

    The R vectors of the smallest values are dealt out, so that one expert alone starts as in PEFT.
    """
    weight = getattr(base, "weight", None)
    if not isinstance(base, nn.Linear | Conv1D) or not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ConfigError(
            f"init_lora_weights='mica': {path} is a {type(base).__name__} whose weight cannot be read, expected an "
            "unquantised linear; use True"
        )
    if weight.numel() == 0:
        raise ConfigError(
            f"init_lora_weights='mica': {path} has no weight here: an engine sharded it, expected a whole one; convert "
            "before the engine takes the model, or use True"
        )
    R = sum(bank.ranks)
    if min(weight.shape) < R:
        raise ConfigError(
            f"init_lora_weights='mica': {path} has experts of {R} ranks in all, expected at most {min(weight.shape)}: "
            "a weight has no more singular vectors"
        )
    _, B_OR = _peft_start("mica", linear_weight(base), R, generator(seed, path))
    bank.lora_A.zero_()
    for e, picks in enumerate(dealt(bank.ranks)):
        bank.lora_B[:, bank.span(e)] = B_OR[:, sorted(R - 1 - i for i in picks)].to(bank.lora_B)


def _peft_start(name: str, weight_OI: Tensor, rank: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) as PEFT starts them on a linear with a float32 copy of this weight."""
    installed_peft(f"init_lora_weights={name!r}")
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    out, width = weight_OI.shape
    base = nn.utils.skip_init(nn.Linear, width, out, bias=False, device=weight_OI.device)
    base.weight.data = weight_OI.float().clone()
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=name)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.initial_seed())
        layer: Any = Linear(base, "default", config, r=rank, lora_alpha=rank)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


STARTED_BY_PEFT: dict[str, Callable[[ExpertBank, nn.Module, str, int], None]] = {
    "orthogonal": _orthogonal,
    "mica": _mica,
}
