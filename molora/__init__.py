"""molora: mixtures of LoRA experts for PyTorch and Hugging Face transformers.

from molora import convert
model = convert(model, "mixlora", r=8, lora_alpha=16, num_experts=8, top_k=2)
"""

from __future__ import annotations

from pathlib import Path as _Path

for _name in ("kernels", "routers", "training", "eval"):
    if not (_Path(__file__).parent / _name).is_dir():
        raise ImportError(
            f"molora/{_name} is not a link to ../{_name}: this checkout lost its symbolic links. Clone again with "
            "`git clone -c core.symlinks=true` (on Windows), or install the wheel, which needs none."
        )

from molora import errors, recipes
from molora.config import MoloraConfig
from molora.context import checkpoint_contexts
from molora.convert import convert
from molora.eval.counting.tape import record_routing
from molora.load import from_pretrained, load
from molora.peft_tuner.register import peft_config, register_with_peft
from molora.recipes import RECIPES
from molora.routers import update_biases
from molora.routing import Routing

__version__ = "0.1.0"

register_with_peft()

__all__ = [
    "RECIPES",
    "MoloraConfig",
    "Routing",
    "checkpoint_contexts",
    "convert",
    "errors",
    "from_pretrained",
    "load",
    "peft_config",
    "recipes",
    "record_routing",
    "update_biases",
]
