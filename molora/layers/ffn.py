"""The ffn unit: a feed-forward block whose outputs are mixed, at the price of one block call per token.

    y = sum_k w_k W2_k( act(W1_k x) * W3_k x ),    Wi_k = Wi + s B_i A_i of the k-th chosen expert

The up-side linears return a slot axis (..., K, F), one slot per chosen expert; the frozen elementwise middle runs on
it unchanged; the down linear contracts it with the weights. By linearity ``sum_k w_k W2 h_k = W2 sum_k w_k h_k``, so
each frozen projection sees every token once, whatever K is (MixLoRA, arXiv 2404.15159, shares W1 and W3 only).
Experts that are always on are part of the linear that they are on: W there stands for ``W + s B A``.
"""

from __future__ import annotations

from typing import cast

import torch
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from molora import context
from molora.config import Placement
from molora.config.site import SiteConfig
from molora.errors import MoloraError
from molora.kernels.dispatch import Unit, add_ranks, contract_slots, expand_slots, unit_for
from molora.kernels.reference import mix_slots
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import Owner
from molora.layers.routed import RoutedModule
from molora.layers.wrapper import Wrapper
from molora.routers.gates import GATES
from molora.routing import Routing

__all__ = ["FFNDown", "FFNRows", "FFNUp"]


class FFNUp(MixtureLinear):
    """An up-side linear: x (..., D) to (..., K, F), one slot per chosen expert. The first to run owns the router.

    Where the block is a gated unit, ``act(u) * v``, and the kernel computes its middle at once, the frozen product and
    the experts' factors go to the down linear directly, and the module's own middle sees a single zero per token.
    """

    one_product = False

    def forward(self, x: Tensor) -> Tensor:
        """Base product once per token, plus each slot's own expert."""
        if context.is_off(self.owner):
            return cast(Tensor, self.base_layer(x))
        dropped = None if self.always is None else self.dropped(x)
        base = self.base(x) if dropped is None else self.linear(x, dropped)
        x_TD = x.reshape(-1, x.shape[-1])
        routing = self.route(x_TD)
        base_TF, bank = base.reshape(-1, base.shape[-1]), self.bank
        if self.site.act and (unit := self._unit(x_TD)) is not None:
            unit.add(base_TF, self.site.gated, self.dropped(x_TD), None if bank is None else bank.packed())
            return base.new_zeros(*base.shape[:-1], 1, 1)
        K = routing.weights.shape[1]
        if bank is None:
            return base.unsqueeze(-2).expand(*base.shape[:-1], K, -1)
        dropped_TD = self.dropped(x_TD) if dropped is None else dropped.reshape(x_TD.shape)
        A_RD, B_FR, layout = bank.packed()
        y_TKF = expand_slots(self.kernel, base_TF, dropped_TD, A_RD, B_FR, routing, layout)
        return y_TKF.view(*base.shape[:-1], K, base.shape[-1])

    def _unit(self, x_TD: Tensor) -> Unit | None:
        """Where to leave this linear's half, or None where the block keeps its slot axis; the leading site decides."""
        units = context.units()
        if self.router is None or self.bank is None:
            return units.get(self.site.block)
        dropout = self.placement.lora_dropout and self.training  # the down experts' mask differs from slot to slot
        unit = None if dropout or self.bank.in_pieces else unit_for(self.kernel, x_TD, self.bank.layout)
        if unit is None:
            units.pop(self.site.block, None)
        else:
            units[self.site.block] = unit
        return unit


class FFNDown(MixtureLinear):
    """The down linear: h (..., K, F) and the block's weights to (..., D)."""

    one_product = False

    def forward(self, h: Tensor) -> Tensor:
        """``W2 (sum_k w_k h_k) + sum_k w_k s B_e A_e h_k``; a bias counts ``sum_k w_k`` times."""
        if context.is_off(self.owner):
            return cast(Tensor, self.base_layer(h))
        h_TKF = h.flatten(0, -3) if h.ndim > 3 else h.reshape(-1, *h.shape[-2:])
        routing = self._of_block(h_TKF.shape[0])
        unit = context.units().pop(self.site.block, None) if self.site.act else None
        if unit is None:
            y_TD = self._from_slots(h_TKF, h.shape[:-2], routing)
        else:
            y_TD = self._from_unit(unit, h.shape[:-2], routing)
        return y_TD.view(*h.shape[:-2], y_TD.shape[-1])

    def _from_slots(self, h_TKF: Tensor, tokens: torch.Size, routing: Routing) -> Tensor:
        weights_TK = routing.weights.to(h_TKF.dtype)
        mixed_TF = dropped_TF = mix_slots(h_TKF, weights_TK)
        dropped_TKF = None if self.always is None else self.dropped(h_TKF)
        if dropped_TKF is not None and dropped_TKF is not h_TKF:  # always-on experts see what the routed ones see
            dropped_TF = mix_slots(dropped_TKF, weights_TK)
        y_TD = self._base_of_mixed(mixed_TF, dropped_TF, tokens, weights_TK)
        if self.bank is None:
            return y_TD
        A_RF, B_DR, layout = self.bank.packed()
        experts = A_RF, B_DR, routing, layout
        dropped_TKF = self.dropped(h_TKF) if dropped_TKF is None else dropped_TKF
        return contract_slots(self.kernel, self.base_layer, y_TD, dropped_TKF, experts)

    def _from_unit(self, unit: Unit, tokens: torch.Size, routing: Routing) -> Tensor:
        A_RF, B_DR, layout = (None, None, None) if self.bank is None else self.bank.packed()
        mixed_TF, h_TR = unit.mix(A_RF, layout, routing, self.site.act)
        y_TD = self._base_of_mixed(mixed_TF, mixed_TF, tokens, routing.weights)
        if B_DR is None or h_TR is None:
            return y_TD
        return add_ranks(self.base_layer, mixed_TF, y_TD, h_TR, B_DR)

    def _base_of_mixed(self, mixed_TF: Tensor, dropped_TF: Tensor, tokens: torch.Size, weights_TK: Tensor) -> Tensor:
        x = mixed_TF.view(*tokens, mixed_TF.shape[-1])
        y = self.linear(x, x if dropped_TF is mixed_TF else dropped_TF.view_as(x))
        y_TD = y.reshape(-1, y.shape[-1])
        if self.bias is not None and not self._sums_to_one():
            if self.bias.is_meta and not y.is_meta:
                raise MoloraError(
                    f"{self.site.path}: its bias is offloaded and is needed here; keep this module in place"
                )
            y_TD = y_TD + (weights_TK.to(y_TD.dtype).sum(1, keepdim=True) - 1) * self.bias
        return y_TD

    def _sums_to_one(self) -> bool:
        frame = context.current()
        edited = frame is not None and frame.editor is not None  # which may take weight away
        gate = self.placement.gate
        return GATES[gate.kind].sums_to_one(gate) and not edited


class FFNRows(RoutedModule, Wrapper):
    """A feed-forward module whose middle cannot carry a slot axis: every token runs once per chosen expert.

    Exact, at K times the base cost. The module's own linears are ordinary sites that read this block's routing.
    """

    around = True

    def __init__(
        self,
        base_layer: nn.Module,
        site: SiteConfig,
        placement: Placement,
        owner: Owner,
        router: nn.Module | None,
    ) -> None:
        super().__init__(site, placement, owner, router)
        self.base_layer = base_layer

    @property
    def place(self) -> str:
        """The path of the block in the base."""
        return self.site.path

    def sites(self) -> dict[str, RoutedModule]:
        """Itself."""
        return {self.site.path: self}

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, D) or (T, D); K copies side by side on the first dimension, mixed by the weights."""
        if context.is_off(self.owner):
            return cast(Tensor, self.base_layer(x))
        routing = self.route(x.reshape(-1, x.shape[-1]))
        slots_TKE = routing.slots()
        K = slots_TKE.shape[1]
        per_row_NE = rearrange(slots_TKE, "t k e -> (k t) e")
        context.scratch()[self.site.block] = Routing(per_row_NE, None, per_row_NE, per_row_NE)
        y = self.base_layer(repeat(x, "b ... d -> (k b) ... d", k=K))
        y_KTD = y.reshape(K, -1, y.shape[-1])
        y_TD = einsum(y_KTD, routing.weights.to(y.dtype), "k t d, t k -> t d")
        return cast(Tensor, y_TD.view(*x.shape[:-1], y.shape[-1]))
