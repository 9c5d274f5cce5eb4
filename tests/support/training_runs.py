"""Short training runs of tiny mixtures with molora's Trainer, for the tests of this process and of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import molora
from molora.training import Trainer, TrainingArguments
from tests.support import behaviours, tiny
from tests.support.traits import strong, traits
from tests.training.test_hf_trainer import rows

__all__ = ["SMOOTH", "build", "data", "logged", "run", "state", "trainer"]

SETTINGS: dict[str, Any] = {
    "max_steps": 3,
    "learning_rate": 0.02,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
    "per_device_train_batch_size": 4,
}

# Adam divides by the size of the gradient, so that rounding in a small one moves a weight by the learning rate.
SMOOTH: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}


def build(recipe: str, name: str = "llama", **more: Any) -> Any:
    """An armed mixture with a balance loss that weighs as much as the model's own."""
    return tiny.arm(molora.convert(tiny.base_model(name), strong(behaviours.config(recipe, name, **more))))


def data(model: Any) -> list[dict[str, Any]]:
    """The eight rows of unequal length; with task ids where the router is supervised."""
    supervised = traits(model).needs_tasks
    return [{k: v for k, v in row.items() if k != "task_ids" or supervised} for row in rows()]


def trainer(model: Any, folder: Path, own: Any = Trainer, **arguments: Any) -> Any:
    settings = TrainingArguments(**{"output_dir": str(folder), **SETTINGS, **arguments})
    return own(model, settings, train_dataset=data(model), eval_dataset=data(model))


def run(model: Any, folder: Path, own: Any = Trainer, resume: Any = None, **arguments: Any) -> Any:
    """The trainer, when it is done."""
    it = trainer(model, folder, own, **arguments)
    it.train(resume_from_checkpoint=resume)
    return it


def state(model: Any) -> dict[str, Tensor]:
    """What training changes."""
    out = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return out | {n: b.clone() for n, b in model.named_buffers() if n.endswith("select_bias")}


def logged(it: Any, key: str) -> Tensor:
    """The logged values of ``key``, by step."""
    return torch.tensor([entry[key] for entry in it.state.log_history if key in entry])
