"""Sums over the tokens of one forward, routers of one shape together, that add up exactly in any order.

Real numbers are rounded to multiples of 2**-20 first: sums of those in float64 are exact for billions of tokens, so
shards and ranks that are merged in whatever order give the bits of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from molora.routing import Routing

__all__ = ["SCALARS", "TIE", "Tally", "length", "pair_counts", "parts", "tally"]

TIE = 1e-4  # margin between the last chosen and the first left-out probability below which a pick may flip
GRAIN = 2.0**20
SCALARS = ("entropy", "tokens", "repeats", "pairs", "ties", "batch_violation", "batches")


@dataclass(frozen=True)
class Tally:
    """One forward of M alike routers. ``sums``: (M, L) as :func:`parts` reads them; ``picks_MBE``: by row of the batch;
    ``top_MT``: each token's favourite expert, -1 for padding and for tokens without an expert.
    """

    sums: Tensor
    picks_MBE: Tensor
    top_MT: Tensor


def length(num_experts: int) -> int:
    """L: picks (E), importance (E), co-activation (E * E), and the :data:`SCALARS`."""
    return 2 * num_experts + num_experts**2 + len(SCALARS)


def parts(sums: Tensor, num_experts: int) -> dict[str, Tensor]:
    """Views of (..., L) by name: ``picks``, ``importance`` (..., E), ``together`` (..., E, E), and each scalar."""
    E = num_experts
    picks, importance, together, scalars = sums.split((E, E, E * E, len(SCALARS)), -1)
    named = dict(zip(SCALARS, scalars.unbind(-1), strict=True))
    return {"picks": picks, "importance": importance, "together": together.unflatten(-1, (E, E)), **named}


def exact(t: Tensor) -> Tensor:
    """The nearest multiples of 2**-20."""
    return (t * GRAIN).round() / GRAIN


@torch.no_grad()
def tally(routings: Sequence[Routing], valid_BS: Tensor) -> Tally:
    """Count one forward. All routings have one E, one K, and the tokens ``valid_BS``, where False is padding."""
    valid_T1 = valid_BS.reshape(-1, 1)
    probs_MTE = torch.stack([r.probs.float() for r in routings])
    M, T, E = probs_MTE.shape
    dense = routings[0].ids is None
    slots_MTK = None if dense else torch.stack([r.slot_ids() for r in routings])
    chosen_MTE = _weights(routings) if slots_MTK is None else _chosen(slots_MTK, E)
    chosen_MTE = chosen_MTE.masked_fill_(~valid_T1, 0.0)
    p_MTE = probs_MTE.clamp_min(0)
    p_MTE /= p_MTE.sum(-1, keepdim=True).clamp_min(1e-12)  # sigmoid gates do not sum to 1
    p_MTE.masked_fill_(~valid_T1, 0.0)
    top_MT, ties_MT = (chosen_MTE.argmax(-1), None) if slots_MTK is None else _best(probs_MTE, chosen_MTE, slots_MTK)
    top_MT = top_MT.masked_fill(~((chosen_MTE.amax(-1) > 0) & valid_T1.squeeze(1)), -1)
    top_MBS = top_MT.view(M, *valid_BS.shape)
    neighbours_MBS = (top_MBS[..., 1:] >= 0) & (top_MBS[..., :-1] >= 0)
    zeros_M = probs_MTE.new_zeros(M, dtype=torch.float64)
    together_MEE = zeros_M.new_zeros(M, E, E) if dense else (chosen_MTE.transpose(1, 2) @ chosen_MTE).double()
    ties_M = zeros_M if ties_MT is None else (ties_MT & (top_MT >= 0)).sum(-1).double()
    scalars = (
        exact(-torch.xlogy(p_MTE, p_MTE).sum(-1)).sum(-1, dtype=torch.float64),
        zeros_M + valid_T1.sum(),
        ((top_MBS[..., 1:] == top_MBS[..., :-1]) & neighbours_MBS).sum((1, 2)).double(),
        neighbours_MBS.sum((1, 2)).double(),
        ties_M,
        zeros_M,
        zeros_M,
    )
    picks_MBE = chosen_MTE.view(M, *valid_BS.shape, E).sum(2, dtype=torch.float64)
    importance_ME = exact(p_MTE).sum(1, dtype=torch.float64)
    sums = (picks_MBE.sum(1), importance_ME, together_MEE.flatten(1), torch.stack(scalars, -1))
    return Tally(torch.cat(sums, -1), picks_MBE, top_MT)


def _weights(routings: Sequence[Routing]) -> Tensor:
    """(M, T, E): absolute weights, for routers that use every expert."""
    return exact(torch.stack([r.weights.float() for r in routings]).abs())


def _chosen(slots_MTK: Tensor, E: int) -> Tensor:
    """(M, T, E) float32: 1 for a chosen expert."""
    zeros_MTE = torch.zeros(*slots_MTK.shape[:2], E, device=slots_MTK.device)
    return zeros_MTE.scatter_add_(2, slots_MTK.clamp_min(0), (slots_MTK >= 0).float())


def _best(probs_MTE: Tensor, chosen_MTE: Tensor, slots_MTK: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable of the chosen experts, and whether the last chosen nearly ties with the first left out."""
    own_MTK, empty_MTK = probs_MTE.gather(2, slots_MTK.clamp_min(0)), slots_MTK < 0
    best_MT1 = own_MTK.masked_fill(empty_MTK, -torch.inf).argmax(-1, keepdim=True)
    lowest_MT = own_MTK.masked_fill(empty_MTK, torch.inf).amin(-1)
    left_out_MT = (probs_MTE - chosen_MTE * 1e30).amax(-1)
    return slots_MTK.gather(2, best_MT1).squeeze(2), (lowest_MT - left_out_MT).abs() < TIE


def pair_counts(first_PT: Tensor, second_PT: Tensor, first_E: int, second_E: int) -> Tensor:
    """How often favourite a of one router meets favourite b of another on the same token, (P, E, E') float64."""
    P, size = first_PT.shape[0], first_E * second_E
    both_PT = (first_PT >= 0) & (second_PT >= 0)
    start_P1 = torch.arange(P, device=first_PT.device).unsqueeze(1) * size
    flat = (start_P1 + first_PT * second_E + second_PT)[both_PT]
    return flat.bincount(minlength=P * size).view(P, first_E, second_E).double()
