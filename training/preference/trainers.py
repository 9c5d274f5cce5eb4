"""TRL's DPOTrainer and GRPOTrainer for a mixture: their losses plus the mixture's own balance loss."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Any

import torch
import trl

from molora import context
from molora.errors import ConfigError
from molora.forward.aux_loss import balance_loss
from molora.forward.frame import run_in_frame
from molora.routers import BALANCES

__all__ = ["DPOTrainer", "GRPOTrainer"]


class _Balanced:
    """``loss + sum of coef * aux`` through what TRL has for models that are mixtures of experts by themselves.

    TRL scores completions by a forward of its own, set on the model object, which calls the backbone past the model's
    forward. Here that forward runs in the mixture's frame, so that routers find the tokens' mask, model-wide gates are
    computed, and reports come together. TRL then adds ``outputs.aux_loss`` times its coefficient: the first is the
    whole weighted sum and the second 1. A base with experts of its own keeps its balance loss, with TRL's coefficient.
    As with the model's own loss, nothing is added in evaluation; the logged ``aux_loss`` is what was added.
    """

    aux_loss_enabled: bool
    router_aux_loss_coef: float

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        _refuse_supervised(model, kwargs.get("peft_config"))
        super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]  # a trainer's
        trained: Any = self.model  # type: ignore[attr-defined]
        base = trained.get_base_model() if hasattr(trained, "get_base_model") else trained
        if not hasattr(base, "_molora"):
            raise ConfigError(
                f"{type(self).__name__}: got a {type(base).__name__} without a mixture; give a model that convert() or "
                "load() returned, or peft_config=molora.peft_config(...); for anything else take TRL's own"
            )
        if "forward" not in vars(base) or not hasattr(self, "aux_loss_enabled"):
            raise ConfigError(f"{type(self).__name__}: works with TRL from 1.16 on, this is {trl.__version__}")
        own = self.router_aux_loss_coef if self.aux_loss_enabled else 0.0
        _frame_scoring(base, own)
        self.aux_loss_enabled, self.router_aux_loss_coef = True, 1.0


class DPOTrainer(_Balanced, trl.DPOTrainer):  # type: ignore[misc,name-defined]  # loaded when asked
    """``trl.DPOTrainer`` that trains routers and their balance loss, too.

    The reference is TRL's: with ``peft_config`` the model with its adapter off, with a ``PeftModel`` a frozen copy of
    the adapter as it came, and for a model that ``convert`` returned its base, loaded once more, or ``ref_model``.

    Raises:
        ConfigError: for a model without a mixture, or one whose routers learn from task ids.
    """


class GRPOTrainer(_Balanced, trl.GRPOTrainer):  # type: ignore[misc,name-defined]  # loaded when asked
    """``trl.GRPOTrainer`` that trains routers and their balance loss, too; errors and references as for DPO."""


def _refuse_supervised(model: Any, peft_config: Any) -> None:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config: Any = getattr(getattr(base, "_molora", None), "config", None) or getattr(peft_config, "config", None)
    for placement in getattr(config, "placements", ()):
        if any(BALANCES[rule.kind].needs_tasks and rule.coef for rule in placement.balance):
            raise ConfigError(
                f"recipe {config.recipe!r}: its routers learn from task ids, which preferences and rewards do not "
                "come with; train them first with molora.training.Trainer, or convert with gate_loss_coef=0"
            )


def _frame_scoring(model: Any, own_coef: float) -> None:
    """Put the mixture's frame around the forward that TRL set on ``model``; other calls are those of its class."""
    scoring = vars(model)["forward"].__func__  # without the object, so that a copy of the model scores itself

    @functools.wraps(inspect.unwrap(type(model).forward))
    def inner(model: Any, **arguments: Any) -> Any:
        return scoring(model, **arguments, fused_lm_head=True)

    def finish(model: Any, mixture: Any, outputs: Any, frame: Any, arguments: dict[str, Any]) -> Any:
        found = balance_loss(model, mixture, frame, arguments)
        total = torch.as_tensor(0.0 if found is None else found[0], device=outputs.log_probs.device)
        if outputs.aux_loss is not None:
            total = total + own_coef * outputs.aux_loss
        return dataclasses.replace(outputs, aux_loss=total)

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return type(self).forward(self, *args, **kwargs)
        if not own_coef:
            kwargs.pop("output_router_logits", None)  # TRL asks so for aux_loss; the base has no router to answer
        if context.is_off(self._molora.owner):
            return inner(self, **kwargs)
        return run_in_frame(self, inner, kwargs, finish=finish)

    model.forward = types.MethodType(forward, model)
