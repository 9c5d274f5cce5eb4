"""What routing says: load, balance, and whether experts specialise on domains. Pure functions of counts.

Letters as in ``molora/routing.py``, and N: documents, G: groups of documents (domains), M: adapted sites.
Counts are of (token, slot) assignments: a token with K choices counts K times, padding not at all.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "assignment_counts",
    "coefficient_of_variation",
    "dead",
    "effective_experts",
    "entropy",
    "group_counts",
    "load",
    "max_violation",
    "mutual_information",
    "permutation_p_value",
]


def assignment_counts(
    weights_TK: Tensor, ids_TK: Tensor | None, valid_T: Tensor | None, num_experts: int, rows: int
) -> Tensor:
    """Assignments of each row of a batch to each expert, (B, E) float64. Empty slots (-1) and padding do not count.

    Dense routing (``ids_TK`` None) has no assignments: every expert counts with its weight.
    """
    if ids_TK is None:
        counts_TE = weights_TK.double()
    else:
        one_hot_TKE = torch.nn.functional.one_hot(ids_TK.clamp_min(0), num_experts) * (ids_TK >= 0).unsqueeze(-1)
        counts_TE = one_hot_TKE.sum(1).double()
    if valid_T is not None:
        counts_TE = counts_TE * valid_T.unsqueeze(-1)
    return counts_TE.view(rows, -1, num_experts).sum(1)


def group_counts(counts_NME: Tensor, group_N: Tensor, num_groups: int) -> Tensor:
    """Sum documents by group: (G, M, E)."""
    one_hot_NG = torch.nn.functional.one_hot(group_N, num_groups).to(counts_NME.dtype)
    return torch.einsum("ng,nme->gme", one_hot_NG, counts_NME)


def load(counts: Tensor) -> Tensor:
    """Share of assignments per expert (last dimension); balanced is 1 / E; a row without assignments stays 0."""
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def max_violation(load_E: Tensor) -> Tensor:
    """``max_e load_e E - 1`` (arXiv 2408.15664, eq. 4), over the last dimension: 0 when balanced, E - 1 collapsed."""
    return load_E.amax(-1) * load_E.shape[-1] - 1


def entropy(share_E: Tensor) -> Tensor:
    """Entropy over log E, over the last dimension: 1 when even, 0 when all is in one place."""
    return -torch.xlogy(share_E, share_E).sum(-1) / math.log(share_E.shape[-1])


def coefficient_of_variation(load_E: Tensor) -> Tensor:
    """Standard deviation of the load over its mean, over the last dimension: 0 balanced, sqrt(E - 1) collapsed.

    Shazeer et al. (arXiv 1701.06538), whose importance loss is its square.
    """
    return load_E.std(-1, correction=0) / load_E.mean(-1).clamp_min(1e-12)


def dead(load_E: Tensor) -> Tensor:
    """Which experts get less than a tenth of the balanced load, (..., E) bool."""
    return load_E < 0.1 / load_E.shape[-1]


def effective_experts(load_E: Tensor) -> Tensor:
    """``exp(H(load))``: how many experts, used evenly, have this entropy; from 1 to E. 0 where nothing was counted."""
    return torch.where(load_E.sum(-1) > 0, (-torch.xlogy(load_E, load_E).sum(-1)).exp(), 0.0)


def mutual_information(counts_GME: Tensor) -> Tensor:
    """Normalised mutual information of expert and group per site, (M,): ``I / sqrt(H(expert) H(group))`` in [0, 1].

    0: routing says nothing about the group; 1: each tells the other. 0 where either has no entropy.
    """
    joint_MGE = counts_GME.transpose(0, 1).double()
    joint_MGE = joint_MGE / joint_MGE.sum((1, 2), keepdim=True).clamp_min(1)
    expert_ME, group_MG = joint_MGE.sum(1), joint_MGE.sum(2)
    h_expert_M, h_group_M = (-torch.xlogy(p, p).sum(-1) for p in (expert_ME, group_MG))
    h_joint_M = -torch.xlogy(joint_MGE, joint_MGE).sum((1, 2))
    information_M = (h_expert_M + h_group_M - h_joint_M).clamp_min(0)
    scale_M = (h_expert_M * h_group_M).sqrt()
    return torch.where(scale_M > 0, information_M / scale_M.clamp_min(1e-12), 0.0)


def permutation_p_value(counts_NME: Tensor, group_N: Tensor, permutations: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Is the information between expert and group more than chance? Groups are shuffled over whole documents.

    Tokens of one document are not independent, so shuffling tokens would call anything significant. The statistic is
    the mean over sites; ``p_value = (1 + #(shuffled >= observed)) / (1 + permutations)``.
    Returns ``nmi`` (mean over sites), ``nmi_per_site``, ``chance`` (mean of the shuffled), ``p_value`` and
    ``permutations``.
    """
    groups = int(group_N.max()) + 1
    observed_M = mutual_information(group_counts(counts_NME, group_N, groups))
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack(
        [
            mutual_information(
                group_counts(counts_NME, group_N[torch.randperm(len(group_N), generator=generator)], groups)
            ).mean()
            for _ in range(permutations)
        ]
    )
    above = int((shuffled >= observed_M.mean() - 1e-12).sum())
    return {
        "nmi": observed_M.mean().item(),
        "nmi_per_site": observed_M.tolist(),
        "chance": shuffled.mean().item(),
        "p_value": (1 + above) / (1 + permutations),
        "permutations": permutations,
    }
