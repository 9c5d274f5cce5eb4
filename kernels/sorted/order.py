"""Which rows belong to which expert, found on the device: nothing here waits for it, no shape depends on a value.

The assignments of one slot name each token once, so every slot is sorted on its own: what programs of one slot write
never meets, and adding the slots one after the other is the same sum each time.

An empty slot (id below 0, or of no expert) is sorted into a last group of its own, the group of expert E, which has
no ranks. So a slot's groups hold every token, and a pass over them writes every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Groups", "Order", "most_tiles", "order_of_ends", "order_of_ids", "tile_ends"]


class Order(NamedTuple):
    """The rows of each slot in the order of their experts.

    ``token_KT``: int32, the tokens of a slot, those of one expert in ascending order; None where rows lie in order.
    ``end_KE``: (K, E + 1) int32, where each expert's group ends in that order; the last is T.
    """

    token_KT: Tensor | None
    end_KE: Tensor


def order_of_ids(ids_TK: Tensor, num_experts: int) -> Order:
    """Sort every slot by expert: (K, T) tokens and (K, E + 1) ends."""
    taken_TK = (ids_TK >= 0) & (ids_TK < num_experts)
    key_KT = torch.where(taken_TK, ids_TK.to(torch.int32), num_experts).t().contiguous()
    sorted_KT, token_KT = key_KT.sort(dim=1, stable=True)
    groups_E = torch.arange(num_experts + 1, dtype=torch.int32, device=ids_TK.device)
    groups_KE = groups_E.expand(ids_TK.shape[1], -1).contiguous()
    end_KE = torch.searchsorted(sorted_KT, groups_KE, right=True, out_int32=True)
    return Order(token_KT.to(torch.int32), end_KE)


def order_of_ends(ends_E: Tensor, rows: int) -> Order:
    """The order of rows that are sorted already: one slot, (1, E + 1) ends. Rows past the last end have no expert.

    Ends beyond the rows, or below the one before, are brought back between them.
    """
    end_E = torch.cat([ends_E, ends_E.new_full((1,), rows)]).clamp(0, rows)
    return Order(None, end_E.cummax(0).values.to(torch.int32).unsqueeze(0))


def tile_ends(end_KE: Tensor, block: int) -> Tensor:
    """(K, E + 1) int32: how many tiles of ``block`` rows the groups up to and with this one take. Tiles never straddle.

    Tile p of a slot belongs to the expert ``sum(tile_ends <= p)``.
    """
    begin_KE = torch.nn.functional.pad(end_KE[:, :-1], (1, 0))
    return ((end_KE - begin_KE + (block - 1)) // block).cumsum(1, dtype=torch.int32)


def most_tiles(tokens: int, num_experts: int, block: int) -> int:
    """What a slot's tiles can be at most, whatever the routing: the size of a grid. Surplus programs return at once.

    As many groups as there can be hold a row each, and every ``block`` further rows are one tile more.
    """
    groups = min(num_experts + 1, tokens)
    return groups + (tokens - groups) // block


class Groups(NamedTuple):
    """Rows in the order of their experts, and where each expert's ranks lie among all of them.

    ``start_E``: (E + 1,) integers, expert e owns the ranks ``start[e]:start[e + 1]``; ``scale_R``: (R,) float32, the
    factor of each rank; ``max_rank``: the largest rank of an expert.
    """

    order: Order
    start_E: Tensor
    scale_R: Tensor
    max_rank: int

    @property
    def num_experts(self) -> int:
        """E."""
        return self.start_E.shape[0] - 1

    @property
    def slots(self) -> int:
        """K."""
        return self.order.end_KE.shape[0]

    @property
    def even(self) -> bool:
        """Whether every expert has ``max_rank`` ranks: no other sum of E ranks is as large."""
        return self.scale_R.shape[0] == self.num_experts * self.max_rank
