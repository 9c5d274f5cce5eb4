"""Add the balance losses of one forward to the model's outputs, so that every trainer trains them unchanged."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from molora.config.options import BalanceOptions
from molora.context import Frame, Report
from molora.errors import ConfigError
from molora.forward.penalty_loss import penalty_loss
from molora.layers.mixture import Mixture
from molora.routers import BALANCES
from molora.routers.balance import combine, observe_all

__all__ = ["add_aux_loss", "balance_loss", "predicted_labels"]


def predicted_labels(model: nn.Module, arguments: dict[str, Any], frame: Frame) -> Tensor:
    """n_b, (B,) float32: how many labels each row predicts, counted as transformers' Trainer counts them.

    Labels of causal losses shift by one; a label per row counts 1; without labels, the row's real tokens count.
    """
    labels, shifted = arguments.get("labels"), arguments.get("shift_labels")
    if isinstance(shifted, Tensor):
        return (shifted != -100).sum(-1).float()
    if not isinstance(labels, Tensor):
        mask = next(iter(frame.masks.values()), None)
        return mask.sum(-1).float() if mask is not None else torch.ones(frame.rows)
    if labels.is_floating_point():
        return torch.ones(labels.shape[0], device=labels.device)
    if labels.ndim == 1:
        return (labels != -100).float()
    return (labels[:, 1:] if _shifts(model) else labels).ne(-100).flatten(1).sum(-1).float()


def _shifts(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
    return causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _weights(model: nn.Module, arguments: dict[str, Any], frame: Frame) -> Tensor:
    """w_b = n_b / N, N from ``num_items_in_batch`` where the forward was given it."""
    n_B = predicted_labels(model, arguments, frame)
    total = arguments.get("num_items_in_batch")
    N = n_B.sum() if total is None else torch.as_tensor(total, dtype=torch.float32, device=n_B.device)
    return n_B / N.clamp_min(1.0)


def balance_loss(
    model: nn.Module, mixture: Mixture, frame: Frame, arguments: dict[str, Any]
) -> tuple[Tensor | float, Tensor | None] | None:
    """(sum of coef * aux, plain mean over routers) of what the routers reported to ``frame``; None without any.

    The sum has the share of the penalties that is this micro-batch's.
    """
    by_rule: dict[BalanceOptions, list[Report]] = defaultdict(list)
    for report in frame.observations or ():
        by_rule[report.rule].append(report)
    asked = [(rule, observe_all(rule, reports)) for rule, reports in by_rule.items()]
    observed = [(rule, seen) for rule, seen in asked if seen]  # no walrus: torch.compile breaks the graph at its cell
    penalty = penalty_loss(mixture) if model.training else None
    if not observed and penalty is None:
        return None
    weight_B = _weights(model, arguments, frame)
    total: Tensor | float = 0.0 if penalty is None else penalty * weight_B.to(penalty.device).sum()
    means = []
    for rule, seen in observed:
        device = seen[0].tensors[0].device
        loss, mean = combine(rule, seen, weight_B.to(device))
        total = rule.coef * loss + _like(total, loss)
        if BALANCES[rule.kind].measures_balance:
            means.append(mean)
    return total, torch.stack(means).mean() if means else None


def add_aux_loss(model: nn.Module, mixture: Mixture, outputs: Any, frame: Frame, arguments: dict[str, Any]) -> Any:
    """``loss`` grows by ``sum of coef * aux`` when the base returned one; ``aux_loss`` is the plain mean over routers.

    Outputs of a dataclass get the field ``aux_loss`` in a subclass, plain dicts the key; tuples get the loss in place
    0 only.

    Raises:
        ConfigError: for an output of another kind, which has no place for the loss.
    """
    found = balance_loss(model, mixture, frame, arguments)
    if found is None:
        return outputs
    total, aux = found
    if isinstance(outputs, tuple):
        has_loss = isinstance(arguments.get("labels"), Tensor) and outputs[0].ndim == 0
        return (outputs[0] + _like(total, outputs[0]), *outputs[1:]) if has_loss else outputs
    if not isinstance(outputs, dict):
        raise ConfigError(
            f"{type(model).__name__}: got a {type(outputs).__name__} as its output in training, expected a "
            "transformers output, a dict or a tuple for the balance loss; return one, or set its coefficient to 0"
        )
    values = dict(outputs)
    base_loss = values.get("loss")
    if isinstance(base_loss, Tensor):
        values["loss"] = base_loss + _like(total, base_loss)
    if aux is not None:
        values["aux_loss"] = aux
    if not dataclasses.is_dataclass(outputs):
        return values
    return with_aux_field(type(outputs))(**values)


def _like(total: Tensor | float, loss: Tensor) -> Tensor | float:
    return total.to(loss.device) if isinstance(total, Tensor) and total.device != loss.device else total


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def with_aux_field(base: type[Any]) -> type[Any]:
    """The output class with one more field, ``aux_loss``: a real field, since an extra key would break pytrees."""
    return _with_aux_field(cast(Hashable, base))


@functools.cache
def _with_aux_field(base: Any) -> type[Any]:
    if any(f.name == "aux_loss" for f in dataclasses.fields(base)):
        return cast(type[Any], base)
    space = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__annotations__": {"aux_loss": Tensor | None},
        "aux_loss": None,
    }
    made: type[Any] = dataclasses.dataclass(type(base.__name__, (base,), space))
    return made
