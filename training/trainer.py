"""transformers' Trainer with what a mixture adds: routing in the logs, whole checkpoints, resuming, honest failures."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from molora import context, processes
from molora.errors import ConfigError
from molora.layers.mixture import HEAD
from molora.model import MixtureModel
from molora.routers import update_biases
from molora.surgery.install import sites_of
from molora.training.finite import NonFiniteError, first_nonfinite, nonfinite_gradient
from molora.training.interrupt import SaveOnInterrupt
from molora.training.meter import RoutingMeter, warnings_of
from molora.training.order import grouped_by_length
from molora.training.saving import WholeCheckpoints

__all__ = ["Trainer"]

ROUTING_LOG = "routing_log.jsonl"
log = logging.getLogger(__name__)


class _Biases(transformers.TrainerCallback):
    """Loss-free biases under DeepSpeed, whose optimizer steps flat copies: torch's own hook sees no router there."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if args.deepspeed:
            update_biases(model)


class Trainer(WholeCheckpoints):
    """``transformers.Trainer`` for a converted model, on one process or many, plain, under DDP or DeepSpeed.

    The loss needs nothing: the model adds its balance loss by itself. What this class adds:

    - logs of ``aux_loss`` and of the routing over all processes, a line of every router's load in
      ``routing_log.jsonl``, and a warning in words when routing collapses or an expert dies (``log_routing``);
    - checkpoints that hold the adapter instead of the base, gathered under ZeRO-3, staged and named in a manifest;
    - ``resume_from_checkpoint=True`` (or ``"auto"``: start anew when there is none) takes the newest whole one;
    - a stop with step and module at a loss or gradient that is not finite (``check_finite``); DeepSpeed has used the
      gradient by then, the checkpoint is still the last good one;
    - ``router_learning_rate`` and ``router_weight_decay``; a checkpoint on Ctrl-C (``save_on_interrupt``).

    Raises:
        ConfigError: for a model that was not converted, several GPUs in one process, or FSDP.
    """

    def __init__(self, model: Any = None, args: Any = None, **kwargs: Any) -> None:
        whole: Any = model
        if not isinstance(whole, MixtureModel):
            raise ConfigError(
                f"Trainer: got a {type(model).__name__}, expected a model that convert() or load() returned"
            )
        if getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
            raise ConfigError(
                "fsdp: accelerate trains without it on a CPU and does not say so, and checkpoints are not gathered "
                "from it; take deepspeed zero3, which shards the same, or torch's fully_shard in a loop of your own"
            )
        config = model._molora.config
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"Trainer: got {self.args.n_gpu} GPUs in one process (DataParallel), expected one a process; start "
                "with torchrun, deepspeed or accelerate, or choose a GPU with CUDA_VISIBLE_DEVICES"
            )
        self._start_counting()
        rules = [rule for p in config.placements for rule in (*p.balance, *p.penalties)]
        self._has_balance_loss = any(rule.coef > 0 for rule in rules)
        if self._has_balance_loss and (self.args.label_smoothing_factor or self.compute_loss_func is not None):
            raise ConfigError(
                "label_smoothing_factor, compute_loss_func: then the loss is not the model's own, and its balance loss "
                "would be lost; leave them out"
            )
        self._idle: dict[tuple[str, int], int] = {}
        self._told: set[tuple[str, int]] = set()
        self.interrupt = SaveOnInterrupt()
        self.add_callback(_Biases())
        if self._option("save_on_interrupt"):
            self.add_callback(self.interrupt)

    def _start_counting(self) -> None:
        sites = [m.site for _, m in sites_of(self.model).values()]
        self._meter = RoutingMeter({s.path: s.num_experts for s in sites if s.role != "parameter"})
        self._aux: list[Tensor] = []
        self._last_logged = self.state.global_step

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        self._start_counting()  # the state of a run that is resumed is there now
        return super()._prepare_for_training(*args, **kwargs)

    def _option(self, name: str, default: Any = True) -> Any:
        return getattr(self.args, name, default)  # transformers' own arguments have none of ours

    # Optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimizer; routers get groups of their own where their learning rate or weight decay was given."""
        rate, decay = self._option("router_learning_rate", None), self._option("router_weight_decay", None)
        if self.optimizer is None and not (rate is decay is None):
            routers = _router_parameters(self.model)
            decayed = set(self.get_decay_parameter_names(self.model))
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    groups.setdefault((id(p) in routers, name in decayed), []).append(p)
            settings = []
            for (is_router, has_decay), parameters in groups.items():
                own_decay = self.args.weight_decay if decay is None or not is_router else decay
                group: dict[str, Any] = {"params": parameters, "weight_decay": own_decay if has_decay else 0.0}
                settings.append(group | ({"lr": rate} if is_router and rate is not None else {}))
            cls, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, self.model)
            if not isinstance(cls, type) or not issubclass(cls, torch.optim.Optimizer) or "params" in options:
                raise ConfigError(
                    f"router_learning_rate, router_weight_decay: the optimizer {self.args.optim} makes its own groups "
                    "of parameters; leave them out, or take adamw_torch"
                )
            self.optimizer = cls(settings, **options)
        return super().create_optimizer(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        return grouped_by_length(self.args, rows) or super()._get_train_sampler(train_dataset)

    # One step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The model's own loss; while training, the routing is counted and the loss looked at."""
        given = dict(inputs)
        if not model.training:
            return self._model_loss(model, inputs, return_outputs, num_items_in_batch)
        owner = self.model._molora.owner
        self._meter.outer = context.tape_of(owner)
        with context.taping(owner, self._meter if self._option("log_routing") else self._meter.outer):
            loss, outputs = self._model_loss(model, inputs, True, num_items_in_batch)
        self._meter.digest()
        aux = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        if aux is not None:
            self._aux.append(self._share(given, num_items_in_batch).to(aux.device) * aux.detach().float())
        if self._option("check_finite") and processes.anywhere(not bool(torch.isfinite(loss.detach())), loss.device):
            self._stop("the loss", first_nonfinite(self.model, given))
        return (loss, outputs) if return_outputs else loss

    def _model_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)

    def _share(self, inputs: dict[str, Any], num_items_in_batch: Any) -> Tensor:
        """The part of the step's predicted labels that is in this micro-batch."""
        labels = inputs.get("shift_labels", inputs.get("labels"))
        if num_items_in_batch is None or not isinstance(labels, Tensor):
            return torch.tensor(1.0 / (processes.count() * self.current_gradient_accumulation_steps))
        shifts = self._loss_shifts_labels and "shift_labels" not in inputs
        counted: Tensor = (labels[..., 1:] if shifts else labels).ne(-100).sum()
        everywhere = self.args.average_tokens_across_devices  # else they were counted in this process only
        share: Tensor = counted / num_items_in_batch / (1 if everywhere else processes.count())
        return share

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """The norm of the gradient; not finite, it stops the run unless a loss scaler skips such steps."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        scaled = getattr(self.accelerator, "scaler", None) is not None or self._option("fp16", False)
        if self._option("check_finite") and not scaled:
            finite = norm is None or bool(torch.isfinite(torch.as_tensor(norm)))
            bad = nonfinite_gradient(self.model) if norm is None or not finite else ""
            if processes.anywhere(bool(bad) or not finite, self.args.device):
                self._stop("the gradient", bad and f"parameter {bad}")
        return norm

    def _stop(self, what: str, where: str) -> None:
        place = f", first in {where}" if where else "; on this process no module shows it"
        raise NonFiniteError(
            f"step {self.state.global_step + 1}: {what} is not finite{place}. Nothing of this step was saved; resume "
            "from the newest checkpoint with a lower learning rate, clipped gradients, or without the offending rows"
        )

    # Logs

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as transformers does; signals get their old handlers back however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.interrupt.restore()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """transformers' logs, with the routing since the last ones beside the loss. Called by every process."""
        if "loss" in logs:
            if self._has_balance_loss:
                own = [sum(float(a) for a in self._aux), float(len(self._aux))]
                aux, seen = processes.total(torch.tensor(own, device=self.args.device)).tolist()
                if seen:
                    logs["aux_loss"] = aux / max(self.state.global_step - self._last_logged, 1)
            loads = self._meter.take(self.args.device) if self._option("log_routing") else []
            if loads:
                self._log_routing(logs, loads)
            self._aux, self._last_logged = [], self.state.global_step
        super().log(logs, start_time)

    def _log_routing(self, logs: dict[str, float], loads: Any) -> None:
        logs["routing_entropy"] = sum(s.entropy for s in loads) / len(loads)
        logs["routing_token_entropy"] = sum(s.token_entropy for s in loads) / len(loads)
        logs["routing_max_violation"] = max(s.max_violation for s in loads)
        logs["routing_min_load"] = min(min(s.load) * len(s.load) for s in loads)
        logs["routing_idle_experts"] = sum(f == 0 for s in loads for f in s.load)
        for message in warnings_of(loads, self._idle, self._told):
            if self.is_world_process_zero():
                log.warning("step %d: %s", self.state.global_step, message)
        if self.is_world_process_zero():
            Path(str(self.args.output_dir)).mkdir(parents=True, exist_ok=True)
            with open(Path(str(self.args.output_dir)) / ROUTING_LOG, "a", encoding="utf-8") as file:
                sites = {s.site: [round(f, 6) for f in s.load] for s in loads}
                file.write(json.dumps({"step": self.state.global_step, "load": sites}) + "\n")


def _router_parameters(model: nn.Module) -> set[int]:
    """Ids of the parameters of routers, the model-wide one included."""
    routers = [m.router for _, m in sites_of(model).values() if m.router is not None]
    head = getattr(model, HEAD, None)
    return {id(p) for router in (*routers, *([] if head is None else [head])) for p in router.parameters()}
