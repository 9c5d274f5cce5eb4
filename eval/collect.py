"""Run documents through a converted model and count where their tokens go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molora.data import Example
from molora.eval.metrics import assignment_counts
from molora.eval.record import record_routing
from molora.eval.score import batches

__all__ = ["RoutingCounts", "count_routing"]


class RoutingCounts(NamedTuple):
    """Assignments per document, site and expert (N, M, E), and the sites' paths; E is the largest site's."""

    counts_NME: Tensor
    sites: tuple[str, ...]
    num_experts: tuple[int, ...]


@torch.no_grad()
def count_routing(model: PreTrainedModel, rows: Sequence[Example], pad_token_id: int, size: int = 8) -> RoutingCounts:
    """Count the assignments of every row, padding left out, at the sites that have a choice of experts.

    A model without such a site gives M = 0.
    """
    model.eval()
    found: dict[str, Tensor] = {}
    for chunk, batch in batches(rows, pad_token_id, size):
        with record_routing(model) as tape:
            model(**{k: v.to(model.device) for k, v in batch.items() if k != "labels"})
        for site, records in tape.items():
            for r in records:
                if r.num_experts > 1:
                    counts_NE = found.setdefault(site, torch.zeros(len(rows), r.num_experts, dtype=torch.float64))
                    counts_NE[chunk] += assignment_counts(r.weights, r.ids, r.valid, r.num_experts, len(chunk))
    largest = max((c.shape[1] for c in found.values()), default=0)
    padded = [torch.nn.functional.pad(c, (0, largest - c.shape[1])) for c in found.values()]
    counts_NME = torch.stack(padded, 1) if padded else torch.zeros(len(rows), 0, 0, dtype=torch.float64)
    return RoutingCounts(counts_NME, tuple(found), tuple(c.shape[1] for c in found.values()))
