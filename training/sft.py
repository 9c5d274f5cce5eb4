"""TRL's SFTTrainer for a mixture: its data handling, with the model's own forward and loss."""

from __future__ import annotations

from typing import Any

import torch
import transformers
import trl

from molora.errors import ConfigError
from molora.training.trainer import Trainer

__all__ = ["SFTTrainer"]


class SFTTrainer(Trainer, trl.SFTTrainer):  # type: ignore[misc,name-defined]  # loaded when asked
    """``trl.SFTTrainer`` with everything of :class:`molora.training.Trainer`.

    TRL's own takes the loss from the backbone's hidden states, past the model's forward: no balance loss would count
    and model-wide gates would be missing, so a mixture refuses to train like that. Here the loss is what the model
    returns. Datasets, chat templates, completion masks and packing are TRL's. The memory that it saves by never making
    all logits is given up, and with it its logs of entropy and token accuracy.

    ``peft_config``: one of :func:`molora.peft_config`, put on the model first. That model or a ``PeftModel`` is trained
    and saved as the model that :func:`molora.convert` returns, which is inside of it.
    """

    def __init__(self, model: Any = None, args: Any = None, peft_config: Any = None, **kwargs: Any) -> None:
        super().__init__(_converted(model, peft_config), args, **kwargs)
        vars(self.model).pop("forward", None)  # TRL's, set on the object: the class's own is behind it

    def _model_loss(self, *args: Any, **kwargs: Any) -> Any:
        return transformers.Trainer.compute_loss(self, *args, **kwargs)


def _converted(model: Any, peft_config: Any) -> Any:
    if peft_config is not None:
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(f"SFTTrainer: got {model!r} with a peft_config, expected a model; load it first")
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
