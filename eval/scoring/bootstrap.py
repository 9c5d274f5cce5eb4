"""How sure a mean is: bounds from drawing the documents again."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["LEVEL", "ratio_bounds"]

LEVEL = (0.025, 0.975)  # 95 % of the resamples lie between


def ratio_bounds(
    sums: Sequence[float], counts: Sequence[float], resamples: int = 500, seed: int = 0
) -> dict[str, float]:
    """``sum(sums) / sum(counts)`` as ``value``, with ``low`` and ``high``: percentiles over resampled documents.

    ``sums`` and ``counts``: one of each a document, as losses and tokens, or right answers and ones. A document is
    drawn whole, with both, so tokens of one text do not pass for independent ones. The same seed, the same bounds.
    """
    both_N2 = torch.tensor([list(sums), list(counts)], dtype=torch.float64).T
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randint(len(both_N2), (len(both_N2),), generator=generator) for _ in range(resamples))
    again_W2 = torch.stack([both_N2[index].sum(0) for index in drawn])
    low, high = torch.quantile(again_W2[:, 0] / again_W2[:, 1], torch.tensor(LEVEL, dtype=torch.float64)).tolist()
    total_2 = both_N2.sum(0)
    return {"value": float(total_2[0] / total_2[1]), "low": low, "high": high}
