"""Let PEFT's loaders know molora's adapters after ``import molora``, which does not import PEFT.

PEFT finds a kind of adapter in tables of its own and has no entry point that would fill them. Importing it takes as
long as importing torch and transformers, so molora waits: when somebody imports PEFT, the tuner is registered right
after. Where PEFT was imported before, that is at once. Without PEFT nothing happens.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from molora.config import MoloraConfig
from molora.extras import missing

__all__ = ["peft_config", "register_with_peft"]

PEFT = "peft"


def peft_config(
    recipe: str | MoloraConfig, *, seed: int = 0, task_type: str | None = None, **options: Any
) -> Any:  # a PeftConfig; its class exists only where PEFT does
    """A ``PeftConfig`` for ``get_peft_model(model, ...)`` and for ``peft_config=`` of TRL's trainers.

    ``recipe``, ``seed`` and ``options`` as in :func:`molora.convert`: the model is the same bit by bit. ``task_type``:
    PEFT's, such as ``"CAUSAL_LM"``. One config object stands for one mixture: the same object under a second name
    is a copy of the first, trained weights included (TRL's DPOTrainer makes its reference so); for a fresh one
    under another name make another config.

    Raises:
        ConfigError: for options that the recipe refuses, and where PEFT is not installed or too old.
    """
    try:
        import molora.peft_tuner.tuner  # noqa: F401 importing it registers it
        from molora.peft_tuner.settings import make_config
    except ImportError as e:
        raise missing(f"peft ({e})", "peft", "peft_config") from e
    return make_config(recipe, seed=seed, task_type=task_type, options=options)


def register_with_peft() -> None:
    """Register now if PEFT is there already, else right after it was imported; the second call does nothing."""
    if sys.modules.get(PEFT) is not None:
        _register()
    elif not any(isinstance(f, _AfterImport) for f in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    try:
        import molora.peft_tuner.tuner  # noqa: F401 importing it registers it
    except (ImportError, AttributeError) as e:  # who imports PEFT for something else must not fail for our sake
        warnings.warn(f"PEFT will not know molora's adapters: {e}", stacklevel=2)


class _AfterImport(MetaPathFinder):
    """Finds PEFT as the other finders do, with a loader that registers the tuner when PEFT is whole."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != PEFT:
            return None
        others = [f for f in sys.meta_path if f is not self]
        spec = next((s for f in others if (s := f.find_spec(name, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(Loader):
    """The loader that it was given, until the module is there."""

    def __init__(self, own: Loader) -> None:
        self.own = own

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.own
        self.own.exec_module(module)
        sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, _AfterImport)]
        _register()
