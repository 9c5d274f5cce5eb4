"""Banks of a linear that are always on, beside its routed one: as if they were part of the linear's weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch

from molora.kernels.reference import Layout
from molora.layers.banks.base import Bank, Packed, RankMaps

__all__ = ["AlwaysOnBanks"]


class AlwaysOnBanks(RankMaps):
    """Always-on banks by name, and the layout of all that is packed into one product with them.

    ``y = W x + sum_a s_a B_a A_a x``, and with a routed bank in front of them in the same product ``+ sum_e w_e s_e B_e
    A_e x``: to a kernel an always-on expert is one more expert, of weight 1, behind the routed ones. The banks are
    children under their own names, so that their state is ``always.<name>.<parameter>``.
    """

    ATTRIBUTES = frozenset(("sizes", "scales", "expert_R", "scale_R", "slot_gate_ER", "start_E", "training"))

    def __init__(self, banks: Mapping[str, Bank], routed: Bank | None) -> None:
        """``routed``: the bank that shares their product, if there is one."""
        super().__init__((), (), next(iter(banks.values())).expert_R.device)
        for name, bank in banks.items():
            self.add_module(name, bank)
        self.beside(routed)

    def beside(self, routed: Bank | None) -> None:
        """Share the product with this routed bank from now on, or with none."""
        banks = _several(routed, self.banks())
        sizes = tuple(r for b in banks for r in b.sizes)
        scales = tuple(s for b in banks for s in b.scales)
        self.map_ranks(sizes, scales, self.expert_R.device)

    def banks(self) -> dict[str, Bank]:
        """The banks by name."""
        return {name: m for name, m in self._modules.items() if isinstance(m, Bank)}

    def packed(self, routed: Bank | None = None) -> Packed:
        """A (R, in), B (out, R) and layout of the product; ``routed``: the bank that it is shared with."""
        banks = _several(routed, self.banks())
        if len(banks) == 1:
            return banks[0].packed()
        packed = [b.packed() for b in banks]
        layout = cast(Layout, self()) if self.scale_R.is_meta else self.layout
        return torch.cat([A for A, _, _ in packed]), torch.cat([B for _, B, _ in packed], 1), layout

    def forward(self) -> Layout:
        """The layout, between the hooks that bring offloaded maps and take them away."""
        return self.layout

    @property
    def experts(self) -> int:
        """How many experts they hold in all."""
        return sum(len(bank.sizes) for bank in self.banks().values())


def _several(routed: Bank | None, banks: Mapping[str, Bank]) -> list[Bank]:
    return [*banks.values()] if routed is None else [routed, *banks.values()]
