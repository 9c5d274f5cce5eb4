"""The mixtures as functions of tensors, for callers with layers of their own; every argument is checked.

Dimension letters: ``molora/routing.py``. On CUDA these run the Triton kernels, on a CPU plain PyTorch; all of them
are differentiable in x, A, B, the weights and the base, work under ``torch.autocast`` (products are then taken in its
dtype) and in ``torch.compile(fullgraph=True)``; nothing in them waits for the device.

Who weighs which ranks is said in one of three ways: ``weights`` (T, K) with ``ids`` (T, K), an id below 0 or of no
expert marking an empty slot; ``weights`` (T, E) alone; or neither, and every rank counts 1. ``expert`` (R,) is the
expert of each rank, so ``torch.arange(R)`` makes every rank an expert of its own; ``scale`` (R,) float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels.checks import expect, lowered
from molora.kernels.glu.ops import mix_glu
from molora.kernels.rank.ops import rank_mix_linear_op, rank_mix_op
from molora.kernels.rank.slot_ops import contract_slots_op, expand_slots_op
from molora.kernels.sorted.ops import gather_mix, grouped_lora, sorted_mix
from molora.kernels.tiles import MAX_RANK

__all__ = ["contract_slots", "expand_slots", "gather_mix", "grouped_lora", "mix_glu", "rank_mix", "rank_mix_linear"]
__all__ += ["rank_mix_linears", "sorted_mix"]


def rank_mix(
    base_TO: Tensor,
    x_TI: Tensor,
    A_RI: Tensor,
    B_OR: Tensor,
    weights: Tensor | None = None,
    ids_TK: Tensor | None = None,
    *,
    expert_R: Tensor,
    scale_R: Tensor,
) -> Tensor:
    """``y = base + ((x A^T) * g) B^T`` with ``g[t, c] = scale[c] * (weight of expert[c] for token t)``.

    Returns (T, O) in the dtype of ``base_TO``, added in float32 and rounded once on CUDA. The base may be the output
    of any layer, quantised or not. ``T`` 0 gives an empty result; no ranks at all give the base.

    Raises:
        ConfigError: shapes that do not fit, tensors on several devices, a dtype that the kernels do not take.
    """
    _check("rank_mix", x_TI, A_RI, B_OR, weights, ids_TK, expert_R, scale_R)
    expect("rank_mix", "base", base_TO, (x_TI.shape[0], B_OR.shape[0]), x_TI.device)
    if A_RI.shape[0] == 0:
        return base_TO
    x_TI = lowered(x_TI)
    y_TO: Tensor = rank_mix_op(base_TO, x_TI, A_RI, B_OR, weights, ids_TK, expert_R, scale_R)[0]
    return y_TO


def rank_mix_linear(
    x_TI: Tensor,
    W_OI: Tensor,
    bias_O: Tensor | None,
    A_RI: Tensor,
    B_OR: Tensor,
    weights: Tensor | None = None,
    ids_TK: Tensor | None = None,
    *,
    expert_R: Tensor,
    scale_R: Tensor,
) -> Tensor:
    """``y = x W^T + b + ((x A^T) * g) B^T`` on a frozen linear: (T, O) in the dtype of x.

    One operator for base and experts: backward writes ``dy W`` and adds the experts' share in place, where two
    modules that share x would leave autograd an extra pass over dx to add them.

    Raises:
        ConfigError: as :func:`rank_mix`; or W or b wants a gradient.
    """
    group = rank_mix_linears(
        x_TI, [W_OI], [bias_O], [A_RI], [B_OR], [weights], [ids_TK], expert_R=[expert_R], scale_R=[scale_R]
    )
    return group[0]


def rank_mix_linears(
    x_TI: Tensor,
    W_OI: Sequence[Tensor],
    bias_O: Sequence[Tensor | None],
    A_RI: Sequence[Tensor],
    B_OR: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    ids_TK: Sequence[Tensor | None],
    *,
    expert_R: Sequence[Tensor],
    scale_R: Sequence[Tensor],
) -> list[Tensor]:
    """:func:`rank_mix_linear` for linears with one input (q, k and v; gate and up): x is read once for all their A.

    One product ``x [A_1; A_2; ...]^T`` forward and one ``[dh_1, dh_2, ...] [A_1; A_2; ...]`` backward, whatever the
    number of linears; each keeps its own experts and weights. Returns a list of (T, O_i) in the dtype of x.

    Raises:
        ConfigError: as :func:`rank_mix`; lists of unequal length; or a frozen weight wants a gradient.
    """
    lists = (W_OI, bias_O, A_RI, B_OR, weights, ids_TK, expert_R, scale_R)
    if not W_OI or len({len(each) for each in lists}) > 1:
        raise ConfigError(
            f"rank_mix_linears: got lists of {[len(each) for each in lists]} items, expected one item for each linear"
        )
    for W, b, A, B, w, i, e, s in zip(*lists, strict=True):
        _check("rank_mix_linear", x_TI, A, B, w, i, e, s)
        expect("rank_mix_linear", "W", W, (B.shape[0], x_TI.shape[1]), x_TI.device)
        if b is not None:
            expect("rank_mix_linear", "bias", b, (B.shape[0],), x_TI.device)
        if W.requires_grad or (b is not None and b.requires_grad):
            raise ConfigError("rank_mix_linear: got a weight that wants a gradient, expected frozen ones; use rank_mix")
        if A.shape[0] == 0:
            raise ConfigError("rank_mix_linear: got no ranks, expected at least one; call the linear itself")
    x_TI = lowered(x_TI)
    W_cast = [W.to(x_TI.dtype) for W in W_OI]
    nothing = x_TI.new_empty(0)
    bias_cast = [nothing if b is None else b.to(x_TI.dtype) for b in bias_O]
    given = ([nothing if t is None else t for t in ts] for ts in (weights, ids_TK))
    rest = (list(A_RI), list(B_OR), *given, list(expert_R), list(scale_R))
    ys: list[Tensor] = rank_mix_linear_op(x_TI, W_cast, bias_cast, *rest)[0]
    return ys


def expand_slots(
    base_TF: Tensor,
    x_TD: Tensor,
    A_RD: Tensor,
    B_FR: Tensor,
    ids_TK: Tensor,
    *,
    expert_R: Tensor,
    scale_R: Tensor,
) -> Tensor:
    """``y[t, k] = base[t] + s B_e A_e x[t]`` with e the expert of slot k: (T, K, F) in the dtype of the base.

    Raises:
        ConfigError: as :func:`rank_mix`.
    """
    _check("expand_slots", x_TD, A_RD, B_FR, None, ids_TK, expert_R, scale_R)
    expect("expand_slots", "base", base_TF, (x_TD.shape[0], B_FR.shape[0]), x_TD.device)
    if A_RD.shape[0] == 0:
        return base_TF.unsqueeze(1).expand(-1, ids_TK.shape[1], -1)
    y_TKF: Tensor = expand_slots_op(base_TF, lowered(x_TD), A_RD, B_FR, ids_TK, expert_R, scale_R)[0]
    return y_TKF


def contract_slots(
    base_TD: Tensor,
    h_TKF: Tensor,
    weights_TK: Tensor,
    A_RF: Tensor,
    B_DR: Tensor,
    ids_TK: Tensor,
    *,
    expert_R: Tensor,
    scale_R: Tensor,
) -> Tensor:
    """``base[t] + sum_k w[t, k] s B_e A_e h[t, k]`` with e the expert of slot k: (T, D) in the dtype of the base.

    Raises:
        ConfigError: as :func:`rank_mix`.
    """
    if h_TKF.ndim != 3 or h_TKF.shape[:2] != ids_TK.shape:
        raise ConfigError(
            f"contract_slots: got h {tuple(h_TKF.shape)} for ids {tuple(ids_TK.shape)}, expected (T, K, F)"
        )
    rows = h_TKF.flatten(0, 1)
    _check("contract_slots", rows, A_RF, B_DR, None, None, expert_R, scale_R)
    expect("contract_slots", "weights", weights_TK, tuple(ids_TK.shape), h_TKF.device)
    expect("contract_slots", "base", base_TD, (h_TKF.shape[0], B_DR.shape[0]), h_TKF.device)
    if A_RF.shape[0] == 0:
        return base_TD
    y_TD: Tensor = contract_slots_op(base_TD, lowered(h_TKF), weights_TK, A_RF, B_DR, ids_TK, expert_R, scale_R)[0]
    return y_TD


def _check(
    what: str,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    expert: Tensor,
    scale: Tensor,
) -> None:
    _expect_rows(what, x)
    T, ranks = x.shape[0], A.shape[0]
    expect(what, "A", A, (ranks, x.shape[1]), x.device)
    expect(what, "B", B, (B.shape[0], ranks), x.device)
    expect(what, "expert", expert, (ranks,), x.device)
    expect(what, "scale", scale, (ranks,), x.device)
    if ranks > MAX_RANK:
        raise ConfigError(f"{what}: got {ranks} ranks side by side, expected at most {MAX_RANK}; use kernel='sorted'")
    for name, t, kind in (("expert", expert, False), ("ids", ids, False), ("weights", weights, True)):
        if t is not None and t.dtype.is_floating_point != kind:
            raise ConfigError(f"{what}: got {name} of {t.dtype}, expected {'a float' if kind else 'an integer'} dtype")
    if weights is not None:
        shape: Any = (T, weights.shape[-1]) if ids is None else tuple(ids.shape)
        expect(what, "weights", weights, shape, x.device)
    if ids is not None:
        expect(what, "ids", ids, (T, ids.shape[-1]), x.device)


def _expect_rows(what: str, x: Tensor) -> None:
    if x.ndim != 2:
        raise ConfigError(f"{what}: got x of {x.ndim} dimensions, expected (tokens, width); flatten it")
    allowed = (torch.float32, torch.bfloat16, torch.float16) if x.is_cuda else None
    if not x.dtype.is_floating_point or (allowed and x.dtype not in allowed):
        raise ConfigError(f"{what}: got x of {x.dtype}, expected float32, bfloat16 or float16; cast it")
