"""What every module with experts shares: asking for the routing of its tokens, and reporting it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from molora import context
from molora.config import Placement, SiteConfig
from molora.context import Frame, Report
from molora.errors import AdapterError, ConfigError, MoloraError
from molora.layers.mixture import Owner
from molora.routers import BALANCES, ROUTERS, BiasedRouter
from molora.routers.balance import Seen
from molora.routers.gates import GATES
from molora.routing import ROUTER_DTYPE, Routing

__all__ = ["RoutedModule"]


class RoutedModule(nn.Module):
    """Anything that routes tokens: asks its router, its block's routing or the model-wide gates, and reports."""

    saved: tuple[str, ...] = ("bank", "router")  # children that an adapter folder keeps

    def __init__(self, site: SiteConfig, placement: Placement, owner: Owner, router: nn.Module | None) -> None:
        super().__init__()
        self.site, self.placement, self.owner, self.router = site, placement, owner, router
        self.always_on = not ROUTERS[placement.router.kind].chooses
        self.model_wide = placement.router.scope == "model"
        self.has_loss = any(b.coef > 0 for b in placement.balance) or any(p.coef > 0 for p in placement.penalties)
        self.is_counted = any(BALANCES[b.kind].at_router for b in placement.balance)

    @property
    def merges(self) -> bool:
        """Whether it computes the base's function of other weights, which do not depend on the token."""
        return False

    def merged(self, weight: Any) -> Tensor:
        """The base's weight with what the site learned in it, in the weight's own layout and dtype.

        Raises:
            AdapterError: for a weight that is none of a plain float linear.
        """
        raise AdapterError(f"{self.site.path}: its experts depend on the token; expected one that is always on")

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
        gate = GATES[config.kind]
        if config.jitter and self.training:
            x_TI = x_TI * torch.empty_like(x_TI).uniform_(1 - config.jitter, 1 + config.jitter)
        rows = frame.rows if frame is not None and x_TI.shape[0] % frame.rows == 0 else 1
        bias_E = router.select_bias if isinstance(router, BiasedRouter) else None
        logits_TE, extras_TX = router(x_TI), None
        if gate.extras:
            logits_TE, extras_TX = logits_TE.tensor_split((-gate.extras,), 1)
        return gate.route(logits_TE, config, self.site.top_k, extras_TX=extras_TX, bias_E=bias_E, rows=rows)

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
