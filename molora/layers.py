"""A frozen linear with a mixture of LoRA experts on it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from molora import context
from molora.bank import ExpertBank
from molora.config import Placement
from molora.config.site import SiteConfig
from molora.context import Frame, Report
from molora.errors import ConfigError, MoloraError
from molora.kernels.dispatch import mix_linear
from molora.routers import BALANCES, BiasedRouter
from molora.routers.balance import Seen
from molora.routers.gates import gate
from molora.routing import ROUTER_DTYPE, Routing, autocast_on

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

__all__ = ["MixtureLinear", "Owner", "RoutedModule", "SavedModule"]


class Owner:
    """Identity of one mixture, held by its sites and its model. ``off``: it computes nothing, in any thread."""

    off = False


class RoutedModule(nn.Module):
    """Anything that routes tokens: asks its router, its block's routing or the model-wide gates, and reports."""

    def __init__(self, site: SiteConfig, placement: Placement, owner: Owner, router: nn.Module | None) -> None:
        super().__init__()
        self.site, self.placement, self.owner, self.router = site, placement, owner, router
        self.always_on = placement.router.kind == "fixed"
        self.model_wide = placement.router.scope == "model"
        self.has_loss = any(b.coef > 0 for b in placement.balance)
        self.is_counted = any(BALANCES[b.kind].at_router for b in placement.balance)

    def route(self, x_TI: Tensor) -> Routing:
        """The routing of this module's tokens (T, I); computed by its router, or left by the block's leading site.

        Raises:
            MoloraError: when a needed context is missing (the layer was called outside of the model's forward).
        """
        frame = context.current()
        if self.model_wide:
            return self._model_wide(frame, x_TI.shape[0], x_TI.device)
        if self.router is None:
            return self._of_block(x_TI.shape[0])
        if frame is None and self.training and torch.is_grad_enabled() and (self.has_loss or self._uncounted()):
            raise self._lost("the place for a balance or gate loss")
        if frame is None and context.editor_of(self.owner) is not None:
            raise self._lost("what tells real tokens from padding, for the editor of its routing,")
        routing = self._ask(x_TI, frame)
        if frame is not None:
            routing = context.edited(frame, self.site.path, self.site.mask, routing)
        if self.site.block:
            context.scratch()[self.site.block] = routing
        self.report(routing, frame, x_TI)
        return routing

    def _uncounted(self) -> bool:
        """Whether a loss-free bias would miss these tokens; a recompute in the backward pass was counted before."""
        return self.is_counted and torch._C._current_graph_task_id() == -1

    def _ask(self, x_TI: Tensor, frame: Frame | None) -> Routing:
        config, router = self.placement.gate, cast(nn.Module, self.router)
        if config.jitter and self.training:
            x_TI = x_TI * torch.empty_like(x_TI).uniform_(1 - config.jitter, 1 + config.jitter)
        rows = frame.rows if frame is not None and x_TI.shape[0] % frame.rows == 0 else 1
        bias_E = router.select_bias if isinstance(router, BiasedRouter) else None
        return gate(router(x_TI), config, self.site.top_k, bias_E, rows)

    def _model_wide(self, frame: Frame | None, tokens: int, device: torch.device) -> Routing:
        if frame is None or (frame.gates is None and frame.pass_value is None):
            raise self._lost("the gates of a model-wide router")
        if frame.gates is None:
            shape, value = (tokens, self.site.num_experts), cast(float, frame.pass_value)
            weights_TE = torch.full(shape, value, dtype=ROUTER_DTYPE, device=device)
            return Routing(weights_TE, None, weights_TE, weights_TE)
        routing = frame.gates[self.site.index]
        if routing.weights.shape[0] != tokens:
            raise MoloraError(
                f"{self.site.path}: got {tokens} tokens, but the model-wide gates are for {routing.weights.shape[0]}; "
                "this module sees another stream of tokens: leave it out with exclude_modules"
            )
        routing = context.edited(frame, self.site.path, self.site.mask, routing)
        self.report(routing, frame, routing.weights)
        return routing

    def _of_block(self, tokens: int) -> Routing:
        routing = context.scratch().get(self.site.block)
        if routing is None or routing.weights.shape[0] != tokens:
            raise self._lost(f"the routing of block {self.site.block}")
        return routing

    def _lost(self, what: str) -> MoloraError:
        return MoloraError(
            f"{self.site.path}: {what} is not there: the layer runs outside of the converted model's forward. Call the "
            "model itself; for activation checkpointing use the model's own (the Trainer flag or "
            "gradient_checkpointing_enable()), not that of FSDP or DeepSpeed; for TRL molora.training.sft.SFTTrainer "
            "and those of molora.training.preference"
        )

    def report(self, routing: Routing, frame: Frame | None, x_TI: Tensor) -> None:
        """Hand the routing to a tape and to the balance rules, when there are any."""
        wanted = frame is not None and frame.observations is not None and self.placement.balance
        if frame is None or not (wanted or frame.tape is not None):
            return
        valid_BS = context.valid_tokens(frame, self.site.mask, x_TI.shape[0], x_TI.device)
        if frame.tape is not None:
            frame.tape.add(self.site.path, routing, valid_BS)
        if not wanted or frame.observations is None:
            return
        task_BS = _task_BS(frame, valid_BS)
        for config in self.placement.balance:
            if BALANCES[config.kind].at_router:
                router = self.router if isinstance(self.router, BiasedRouter) else None
                BALANCES[config.kind].observe(config, Seen(routing, valid_BS, task_BS, router, frame.recompute))
            else:
                place = (self.site.path, self.site.layer, self.site.mask)
                frame.observations.append(Report(*place, config, routing, valid_BS, task_BS))


def _task_BS(frame: Frame, valid_BS: Tensor) -> Tensor | None:
    task = frame.task_ids
    if task is None:
        return None
    if task.ndim == 1:
        task = task.unsqueeze(1).expand(-1, valid_BS.shape[1])
    if task.shape != valid_BS.shape:
        raise ConfigError(
            f"task_ids: got shape {tuple(task.shape)} for a stream of {tuple(valid_BS.shape)} tokens, expected one id "
            "a row, or one a token of every stream with a router"
        )
    return task


class MixtureLinear(RoutedModule):
    """``y = W x + sum_e w_e(x) s_e B_e A_e dropout(x)`` on a frozen linear that is always called, never read.

    x: (..., in_features) in the base's dtype; y: (..., out_features) in the dtype the base returns. Works on any
    module that maps the last dimension, quantised or not. Off (``disable_adapter``), it is the base call itself.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        site: SiteConfig,
        placement: Placement,
        owner: Owner,
        router: nn.Module | None,
        bank: ExpertBank | None,
        kernel: str,
    ) -> None:
        super().__init__(site, placement, owner, router)
        self.base_layer, self.bank, self.kernel = base_layer, bank, kernel

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

    def extra_repr(self) -> str:
        """Experts, total rank and choices, for ``print(model)``."""
        ranks = self.site.expert_ranks()
        return (
            f"experts={self.site.num_experts}, total_rank={sum(ranks)}, top_k={self.site.top_k}, role={self.site.role}"
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
        if frame is not None and frame.tape is not None and self.router is not None:
            self.report(gate(self.router(x_TI), self.placement.gate, None), frame, x_TI)

    def forward(self, x: Tensor) -> Tensor:
        """The sum above; shapes and dtypes as in the class docstring."""
        off, frame = context.here(self.owner)
        if off or (self.model_wide and frame is not None and frame.pass_value == 0.0):
            return cast(Tensor, self.base_layer(x)) if off else self.base(x)
        x_TI = x.reshape(-1, x.shape[-1])
        dropped_TI = self.dropped(x_TI)
        routing = self._routing(x_TI, dropped_TI)
        bank = self.bank
        if bank is None:
            return self.base(x)
        A_RI, B_OR, layout = bank.packed()
        experts = A_RI, B_OR, routing, layout
        read = x.ndim == 2 or x.is_contiguous()  # else nn.Linear multiplies batch by batch, and rounds otherwise
        y_TO = mix_linear(self.kernel, self.base_layer, lambda: self.base(x), x_TI, dropped_TI, experts, read)
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])


class SavedModule(nn.Module):
    """A module trained and saved whole (``modules_to_save``): a trainable copy beside the frozen original."""

    def __init__(self, original: nn.Module, trained: nn.Module, owner: Owner, path: str) -> None:
        super().__init__()
        self.original, self.trained, self.owner, self.path = original, trained, owner, path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output; the original's while the adapter is off."""
        return (self.original if context.is_off(self.owner) else self.trained)(*args, **kwargs)
