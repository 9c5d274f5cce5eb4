"""A frozen linear with a mixture of LoRA experts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from molora import context
from molora.config import Placement, SiteConfig
from molora.config.site import TAKES_BACK
from molora.errors import AdapterError, ConfigError
from molora.kernels.dispatch import for_every_token, mix_linear
from molora.layers.banks import Bank, banks_of
from molora.layers.banks.always_on import AlwaysOnBanks
from molora.layers.banks.frozen_ranks import with_start_taken_back
from molora.layers.mixture import Owner
from molora.layers.routed import RoutedModule
from molora.layers.wrapper import Wrapper
from molora.routing import Routing, autocast_on

__all__ = ["FLOATS", "HALF", "MixtureLinear"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.float16, torch.bfloat16)


class MixtureLinear(RoutedModule, Wrapper):
    """``y = W x + sum_e w_e(x) s_e B_e A_e dropout(x)`` on a frozen linear that is always called, never read.

    x: (..., in_features) in the base's dtype; y: (..., out_features) in the dtype the base returns. Works on any
    module that maps the last dimension, quantised or not. Off (``disable_adapter``), it is the base call itself.

    Banks that are always on add ``sum_a s_a B_a A_a dropout(x)``. They are part of the linear: no router, tape or
    balance rule sees them. All banks are one product here, with weight 1 for those experts.
    """

    saved = ("bank", "always", "router")
    one_product: ClassVar[bool] = True  # whether always-on experts are in the product of the routed ones

    def __init__(
        self,
        base_layer: nn.Module,
        site: SiteConfig,
        placement: Placement,
        owner: Owner,
        router: nn.Module | None,
        bank: Bank | None,
        kernel: str,
        always: Mapping[str, Bank] | None = None,
    ) -> None:
        super().__init__(site, placement, owner, router)
        self.base_layer, self.bank, self.kernel = base_layer, bank, kernel
        self.always = AlwaysOnBanks(always, bank if self.one_product else None) if always else None

    def use_bank(self, bank: Bank | None) -> None:
        """Put another bank in the place of the routed one."""
        self.bank = bank
        if self.always is not None and self.one_product:
            self.always.beside(bank)

    def take_start_back(self) -> None:
        """Have the routed experts, as they are now, take themselves back: they add nothing until they are trained.

        Raises:
            ConfigError: for a bank that is not made of A and B alone.
        """
        if self.bank is not None:
            site = self.site.of_kind(TAKES_BACK)
            self.use_bank(with_start_taken_back(self.bank, site))
            self.site = site

    def drop_always(self, name: str) -> None:
        """Take one always-on bank off."""
        assert self.always is not None
        left = {n: b for n, b in self.always.banks().items() if n != name}
        self.always = AlwaysOnBanks(left, self.bank if self.one_product else None) if left else None
        self.site = self.site.replace(banks=tuple(b for b in self.site.banks if b.name != name))

    @property
    def place(self) -> str:
        """The path of the linear in the base."""
        return self.site.path

    def sites(self) -> dict[str, RoutedModule]:
        """Itself."""
        return {self.site.path: self}

    @property
    def weight(self) -> Any:
        """The base's weight, for modelling code that looks at its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The base's bias, or None."""
        return getattr(self.base_layer, "bias", None)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.site.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.site.out_features

    @property
    def merges(self) -> bool:
        """Where there is one expert, always on."""
        return self.always_on and self.site.num_experts == 1

    def merged(self, weight: Any) -> Tensor:
        """``W + sum of s B A`` over all banks, summed in float32."""
        return self.with_banks(weight, list(banks_of(self).values()))

    def with_banks(self, weight: Any, banks: Sequence[Bank]) -> Tensor:
        """The same of these banks, each of which has one expert."""
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or not banks:
            raise AdapterError(
                f"{self.site.path}: cannot merge into a {type(self.base_layer).__name__}; only plain float linears"
            )
        deltas_OI = [scale * (B.float() @ A.float()) for A, B, scale in (bank.as_lora(0) for bank in banks)]
        delta_OI = sum(deltas_OI[1:], deltas_OI[0])
        transposed = weight.shape != delta_OI.shape or hasattr(self.base_layer, "nx")
        return weight + (delta_OI.t() if transposed else delta_OI).to(weight.dtype)

    def extra_repr(self) -> str:
        """Experts, total rank and choices, for ``print(model)``."""
        site, always = self.site, "".join(f", always_on={b.name}" for b in self.site.banks)
        return (
            f"experts={site.num_experts}, total_rank={site.total_rank()}, top_k={site.top_k}, role={site.role}{always}"
        )

    def base(self, x: Tensor) -> Tensor:
        """The frozen linear's own output.

        Raises:
            ConfigError: for an input of another float dtype than the weight's, without autocast.
        """
        layer = cast(nn.Module, self._modules["base_layer"])
        weight = layer._parameters.get("weight")
        dtype = x.dtype if weight is None else weight.dtype
        if dtype != x.dtype and dtype in FLOATS and not autocast_on(x):
            raise ConfigError(
                f"{self.site.path}: got an input of {x.dtype} on weights of {dtype}, expected one dtype; cast "
                f"the inputs to {dtype}, load the model in {x.dtype}, or run under torch.autocast"
            )
        return cast(Tensor, layer(x))

    def linear(self, x: Tensor, dropped: Tensor) -> Tensor:
        """The linear with what is always on, ``W x + sum_a s_a B_a A_a dropped``; shapes as in the class docstring."""
        if self.always is None:
            return self.base(x)
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = x_TI if dropped is x else dropped.reshape(x_TI.shape)
        A_RI, B_OR, layout = self.always.packed()
        experts, read = (A_RI, B_OR, None, layout), x.ndim == 2 or x.is_contiguous()
        kernel = for_every_token(self.kernel)
        y_TO = mix_linear(kernel, self.base_layer, lambda: self.base(x), x_TI, dropped_TI, experts, read)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    def dropped(self, x_TI: Tensor) -> Tensor:
        """The experts' input: one dropout mask for all of them, in train mode only."""
        p = self.placement.lora_dropout
        return nn.functional.dropout(x_TI, p, True) if p and self.training else x_TI

    def _routing(self, x_TI: Tensor, dropped_TI: Tensor) -> Routing | None:
        if self.always_on:
            self._report_always_on(x_TI)
            return None
        return self.route(dropped_TI if self.placement.router.dropped_input else x_TI)

    def _report_always_on(self, x_TI: Tensor) -> None:
        frame = context.current()
        if frame is None and self.has_loss and self.training and torch.is_grad_enabled():
            raise self._lost("the place for a penalty")
        if frame is not None and frame.tape is not None and self.router is not None:
            logits_TE = self.router(x_TI)
            ones_TE = torch.ones_like(logits_TE)
            self.report(Routing(ones_TE, None, ones_TE, logits_TE), frame, x_TI)

    def forward(self, x: Tensor) -> Tensor:
        """The sum above; shapes and dtypes as in the class docstring."""
        off, frame = context.here(self.owner)
        if off:
            return cast(Tensor, self.base_layer(x))
        if self.model_wide and frame is not None and frame.pass_value == 0.0 and self.always is None:
            return self.base(x)
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = self.dropped(x_TI)
        routing = self._routing(x_TI, dropped_TI)
        bank = self.bank
        if bank is None:
            return self.base(x)
        if self.always is None:
            A_RI, B_OR, layout = bank.packed()
        else:
            A_RI, B_OR, layout = self.always.packed(bank)
            routing = None if routing is None else routing.beside(self.always.experts)
        experts = A_RI, B_OR, routing, layout
        read = x.ndim == 2 or x.is_contiguous()  # else nn.Linear multiplies batch by batch, and rounds otherwise
        y_TO = mix_linear(self.kernel, self.base_layer, lambda: self.base(x), x_TI, dropped_TI, experts, read)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])
