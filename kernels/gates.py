"""Who weighs which ranks: what the gate of a kernel is made of, as tensors. No Triton, no autograd."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["ALWAYS", "DENSE", "TOP_K", "Gates"]

ALWAYS, TOP_K, DENSE = 0, 1, 2  # the values stand in the kernels, too


class Gates(NamedTuple):
    """Who weighs which ranks.

    ``weights``: (T, K), or (T, E) where ``ids`` is None, float, any strides; None: every rank counts 1.
    ``ids``: (T, K) integers; below 0, or E and above, marks an empty slot, whatever its weight is.
    ``expert``: (R,) integers, the expert of each rank. ``scale``: (R,) float32.
    """

    weights: Tensor | None
    ids: Tensor | None
    expert: Tensor
    scale: Tensor

    @property
    def form(self) -> int:
        """ALWAYS, TOP_K or DENSE: how the kernels read the weights."""
        return ALWAYS if self.weights is None else DENSE if self.ids is None else TOP_K

    @property
    def slots(self) -> int:
        """Weights of a row."""
        return 1 if self.weights is None else self.weights.shape[1]

    def arguments(self) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor, int, int]:
        """Pointers and strides in the order of the kernels."""
        w, ids = self.weights, None if self.ids is None else self.ids.contiguous()
        return w, ids, self.expert, self.scale, 0 if w is None else w.stride(0), 0 if w is None else w.stride(1)
