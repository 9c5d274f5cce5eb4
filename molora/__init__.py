"""molora: mixtures of LoRA experts for PyTorch and Hugging Face transformers.

from molora import convert
model = convert(model, "mixlora", r=8, lora_alpha=16, num_experts=8, top_k=2)
"""

from __future__ import annotations

try:
    from molora.kernels import dispatch as _dispatch  # noqa: F401
except ModuleNotFoundError as e:
    if not (e.name or "").startswith("molora.kernels"):
        raise
    raise ImportError(
        "molora/kernels is not a link to ../kernels: this checkout lost its symbolic links. "
        "On Windows run `git clone -c core.symlinks=true`, or install the wheel, which needs none."
    ) from e

from molora import errors, recipes
from molora.config import MoloraConfig
from molora.context import checkpoint_contexts
from molora.convert import convert
from molora.eval.record import record_routing
from molora.load import from_pretrained, load
from molora.recipes import RECIPES
from molora.routers import update_biases
from molora.routing import Routing

__version__ = "0.1.0"

__all__ = [
    "RECIPES",
    "MoloraConfig",
    "Routing",
    "checkpoint_contexts",
    "convert",
    "errors",
    "from_pretrained",
    "load",
    "recipes",
    "record_routing",
    "update_biases",
]
