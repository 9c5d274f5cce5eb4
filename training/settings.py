"""transformers' TrainingArguments and the few that a mixture adds."""

from __future__ import annotations

from dataclasses import dataclass, field

import transformers

from molora.errors import ConfigError

__all__ = ["TrainingArguments"]


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Everything of ``transformers.TrainingArguments``, and how routers are trained and watched."""

    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of routers; the same as learning_rate when not given."}
    )
    router_weight_decay: float | None = field(
        default=None, metadata={"help": "Weight decay of routers; the same as weight_decay when not given."}
    )
    log_routing: bool = field(
        default=True,
        metadata={"help": "Log load, entropy and balance of the routers, and warn when routing collapses."},
    )
    check_finite: bool = field(
        default=True, metadata={"help": "Stop at a loss or gradient that is NaN or infinite, before it is used."}
    )
    save_on_interrupt: bool = field(
        default=True, metadata={"help": "On Ctrl-C or SIGTERM finish the step, save a checkpoint, and stop."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        for name in ("router_learning_rate", "router_weight_decay"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"{name}: got {value}, expected a number of at least 0")
