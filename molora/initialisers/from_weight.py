"""Starts of experts that PEFT computes: its initialiser runs on a stand-in for the frozen linear.

Experts differ from the first step on: each has its own draw, or its own share of the singular vectors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.errors import ConfigError
from molora.extras import FAULTS, need
from molora.initialisers.base import Initialiser
from molora.layers.banks.plain import ExpertBank
from molora.layers.linear import MixtureLinear
from molora.seeds import generator

__all__ = ["MiCA", "OLoRA", "Orthogonal", "PiSSA", "deal_out", "dealt", "peft_start", "readable_weight"]


def dealt(ranks: Sequence[int]) -> list[list[int]]:
    """Indices 0, 1, ... given to the experts in turn, each up to its rank: [2, 1] gives [[0, 2], [1]]."""
    out: list[list[int]] = [[] for _ in ranks]
    turns = [e for r in range(max(ranks, default=0)) for e, rank in enumerate(ranks) if r < rank]
    for i, e in enumerate(turns):
        out[e].append(i)
    return out


def deal_out(m: MixtureLinear, A_RI: Tensor, B_OR: Tensor) -> None:
    """Give the experts of a linear their shares of R ranks, and have them taken back from there on."""
    assert m.bank is not None
    for e, picks in enumerate(dealt(m.bank.ranks)):
        m.bank.set_expert(e, A_RI[picks], B_OR[:, picks])
    m.take_start_back()


class Orthogonal(Initialiser):
    """PEFT's orthogonal start, one draw for each expert.

    With Q a random orthogonal (r, r) matrix, ``A = (X Q_odd)^T / 10`` and ``B = Y Q_even / 10``, so ``B A = 0``. Ranks
    are even.
    """

    about = "A and B in orthogonal halves of each expert's ranks"
    needs_linear = in_halves = True

    @classmethod
    def start(cls, m: MixtureLinear, bank: ExpertBank, path: str, seed: int) -> None:
        """See the class."""
        stand_in = torch.zeros(bank.lora_B.shape[0], bank.lora_A.shape[1])
        for e, r in enumerate(bank.ranks):
            bank.set_expert(e, *peft_start("orthogonal", stand_in, r, generator(seed, path, "orthogonal", str(e))))


class MiCA(Initialiser):
    """MiCA's start (arXiv 2604.01694): B the left singular vectors of the smallest singular values, A zero.

    The R vectors of the smallest values are dealt out, so that one expert alone starts as in PEFT.
    """

    about = "B from the weight's minor singular vectors, frozen, zero A"
    needs_linear, trains_B = True, False

    @classmethod
    def start(cls, m: MixtureLinear, bank: ExpertBank, path: str, seed: int) -> None:
        """See the class."""
        R = sum(bank.ranks)
        weight_OI = readable_weight(m, R, "init_lora_weights='mica'")
        _, B_OR = peft_start("mica", weight_OI, R, generator(seed, path))
        bank.lora_A.zero_()
        for e, picks in enumerate(dealt(bank.ranks)):
            bank.lora_B[:, bank.span(e)] = B_OR[:, sorted(R - 1 - i for i in picks)].to(bank.lora_B)


class PiSSA(Initialiser):
    """PiSSA (arXiv 2404.02948, eq. 2-3): ``s B0 A0`` the weight's principal part, to the R ranks of all experts.

    The ranks are dealt out, and each expert takes its own part back.
    """

    name = "'pissa' or 'pissa_niter_[steps]'"
    about = "A and B of the weight's principal singular vectors"
    needs_linear = takes_back = in_steps = True

    @classmethod
    def start(cls, m: MixtureLinear, bank: ExpertBank, path: str, seed: int) -> None:
        """See the class."""
        R, name = sum(bank.ranks), m.placement.init_lora_weights
        weight_OI = readable_weight(m, R, f"init_lora_weights={name!r}")
        deal_out(m, *peft_start(name, weight_OI, R, generator(seed, path), scale=bank.scales[0]))


class OLoRA(PiSSA):
    """OLoRA (arXiv 2406.01775, alg. 1): B0 the first columns of Q and A0 the first rows of R, ``W = Q R``."""

    name, about = "", "of its QR decomposition"
    in_steps = False


def readable_weight(m: MixtureLinear, ranks: int, what: str) -> Tensor:
    """The base weight (O, I) in floating point; of a quantised linear a copy, where PEFT knows how to unpack it.

    Raises:
        ConfigError: with ``what`` needs it, where it cannot be read, or has fewer singular vectors than ``ranks``.
    """
    base, path = m.base_layer, m.site.path
    need("peft", "peft", what)
    from peft.utils.integrations import dequantize_module_weight

    try:
        weight = dequantize_module_weight(base).detach() if isinstance(base, nn.Linear | Conv1D) else None
    except FAULTS:
        weight = None
    if weight is None or not weight.is_floating_point():
        raise ConfigError(
            f"{what}: {path} is a {type(base).__name__} whose weight cannot be read, expected a linear that is not "
            "quantised, or one that PEFT can unpack; use True"
        )
    if weight.numel() == 0:
        raise ConfigError(
            f"{what}: {path} has no weight here: an engine sharded it, expected a whole one; convert before the "
            "engine takes the model, or use True"
        )
    if min(weight.shape) < ranks:
        raise ConfigError(
            f"{what}: {path} has experts of {ranks} ranks in all, expected at most {min(weight.shape)}: a weight has "
            "no more singular vectors"
        )
    return weight.T if isinstance(base, Conv1D) else weight


def peft_start(
    name: str,
    weight_OI: Tensor,
    rank: int,
    rng: torch.Generator,
    *,
    scale: float = 1.0,
    found: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r) as PEFT starts them on a linear with a float32 copy of this weight, with factor ``scale``.

    ``found``: what PEFT's preparations left on the linear. ``options``: more of PEFT's ``LoraConfig``.
    """
    need("peft", "peft", f"init_lora_weights={name!r}")
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    out, width = weight_OI.shape
    base = nn.utils.skip_init(nn.Linear, width, out, bias=False, device=weight_OI.device)
    base.weight.data = weight_OI.float().clone()
    for key, value in (found or {}).items():
        setattr(base, key, value)
    alpha: Any = scale * rank  # PEFT annotates an integer and divides
    config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=name, **options)  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(rng.initial_seed())
        layer: Any = Linear(base, "default", config, r=rank, lora_alpha=alpha)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
