"""LoRA on a base's own experts: weights that are stacked in parameters of three dimensions, behind the base's router.

transformers hands a block of experts (up, gate, activation, down) to one function of its weights, in one of several
layouts, and nothing can be put between a product and its activation. The weights can be other ones, though: expert e
gets a LoRA of its own, and for the time of one call the block sees

    W'_e = W_e + s B_e A_e        A: (E r, in)   B: (out, E r)   W: (E, out, in), or (E, in, out) where it is transposed

which is the parameter's own shape, so every layout and every implementation of the block works as it is. The base's
router stays the router. PEFT calls this ``target_parameters``.

What it costs: a tensor of the parameter's size for each forward (``E a b`` elements of the base's dtype). The block's
products keep it for their backward pass, where the frozen parameter is kept for nothing: with L layers ``L E a b``
elements, and one layer's under activation checkpointing. The backward pass makes one more, the gradient of W'
(measured on a CPU: 4.3 for L = 3 with ``grouped_mm``, transformers' default, 2.3 under checkpointing; the eager
implementation, which takes experts one by one, 5.4 and 3.4; ``batched_mm`` copies weights for each token itself).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from molora import context
from molora.config import Placement
from molora.config.site import SiteConfig
from molora.errors import MoloraError
from molora.layers.banks import Bank
from molora.layers.mixture import Owner
from molora.layers.routed import RoutedModule
from molora.layers.wrapper import Wrapper
from molora.routing import autocast_on

__all__ = ["FusedExperts", "FusedParameter"]


class FusedParameter(RoutedModule):
    """The LoRAs of one stacked parameter: a bank of E experts of rank r, all of them in force, without a router."""

    def __init__(self, site: SiteConfig, placement: Placement, owner: Owner, bank: Bank) -> None:
        super().__init__(site, placement, owner, None)
        self.bank = bank

    def extra_repr(self) -> str:
        """Experts and rank, for ``print(model)``."""
        return f"experts={self.site.num_experts}, r={self.site.ranks[0]}, shape={self.site.stacked()}"

    @property
    def merges(self) -> bool:
        """Always: there is no router."""
        return True

    def merged(self, weight: Any) -> Tensor:
        """As its forward does it."""
        merged: Tensor = self(weight)
        return merged

    def forward(self, stacked: Tensor) -> Tensor:
        """``W + s B A`` for each expert: W (E, a, b) to a new tensor of its shape and dtype, W's own bits at B = 0.

        On a half-precision base the factors are rounded to its dtype, and so is the sum.
        """
        A_RI, B_OR, layout = self.bank.packed()
        E, r = self.site.num_experts, layout.ranks[0]
        A = A_RI.to(stacked.dtype).view(E, r, -1)
        B = B_OR.to(stacked.dtype).view(-1, E, r).transpose(0, 1)
        left, right = (A.mT, B.mT) if self.site.transposed else (B, A)
        if not autocast_on(stacked):
            return torch.baddbmm(stacked, left, right, alpha=layout.scales[0])
        with torch.autocast(stacked.device.type, enabled=False):  # the block casts the sum, as it casts its own weight
            return torch.baddbmm(stacked, left, right, alpha=layout.scales[0])


class FusedExperts(Wrapper):
    """A frozen block of experts that is called with other weights, those of :class:`FusedParameter`.

    It takes and returns what the block does, and has the block's attributes. The block itself, its parameters and its
    state are never changed; off (``disable_adapter``), it is the block's own call.
    """

    around, saved = True, ()  # what is saved is its sites'

    def __init__(self, base_layer: nn.Module, parts: Mapping[str, FusedParameter], owner: Owner, path: str) -> None:
        super().__init__()
        self.base_layer, self.adapted, self.owner, self.path = base_layer, nn.ModuleDict(parts), owner, path

    def __getattr__(self, name: str) -> Any:
        """The block's attributes, for modelling code that reads them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":  # not there yet, or of a mixture that is not in force
                raise
            return getattr(self.base_layer, name)

    @property
    def place(self) -> str:
        """The path of the block in the base."""
        return self.path

    def sites(self) -> dict[str, RoutedModule]:
        """Its adapted parameters, whose paths are the parameters'."""
        return {part.site.path: part for part in self.parts().values()}

    def weight_of(self, site: RoutedModule) -> Any:
        """The stacked parameter."""
        return self.base_layer.get_parameter(site.site.path.rpartition(".")[2])

    def parts(self) -> dict[str, FusedParameter]:
        """The adapted parameters by their names in the block."""
        return cast(dict[str, FusedParameter], dict(self.adapted.items()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output with each adapted parameter replaced for this call.

        Raises:
            MoloraError: for a parameter that is not whole here: partitioned by ZeRO-3, sharded or offloaded.
        """
        if context.is_off(self.owner):
            return self.base_layer(*args, **kwargs)
        nowhere = any(isinstance(t, Tensor) and t.is_meta for t in (*args, *kwargs.values()))  # shapes alone
        weights = {name: part(self._whole(name, part, nowhere)) for name, part in self.parts().items()}
        # A function of weights wherever something stands between the module and its forward: the compiler, or hooks of
        # accelerate. It puts them into the module meanwhile, which another thread would see; a twin, nobody sees.
        if torch.compiler.is_compiling() or "forward" in vars(self.base_layer):
            return functional_call(self.base_layer, weights, args, kwargs)
        return _twin(self.base_layer, weights)(*args, **kwargs)

    def _whole(self, name: str, part: FusedParameter, nowhere: bool) -> Tensor:
        weight = cast(Tensor, self.base_layer._parameters[name])
        sharded = hasattr(weight, "ds_id") or hasattr(weight, "device_mesh")  # ZeRO-3; FSDP and tensor parallelism
        if sharded or weight.is_meta != nowhere or tuple(weight.shape) != part.site.stacked():
            raise MoloraError(
                f"{part.site.path}: the base's experts are not whole when they are called (ZeRO-3, another sharding of "
                "this module, or offload keeps them elsewhere), and an adapted parameter has to be; train with ZeRO-1 "
                "or 2, keep these modules on the device, or leave target_parameters out"
            )
        return weight


def _twin(module: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A module that shares everything with ``module`` but these weights, for one call."""
    twin: nn.Module = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__["_parameters"] = {**module._parameters, **weights}
    twin.__dict__["_compiled_call_impl"] = None  # bound to the module itself
    return twin
