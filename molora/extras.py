"""Optional packages: imported where they are used, with one hint where they are missing."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from molora.errors import ConfigError

__all__ = ["FAULTS", "missing", "need", "package_folder"]

# What PEFT and a model's own code raise for a folder that does not fit.
FAULTS = (ValueError, TypeError, KeyError, AttributeError, IndexError, RuntimeError, ImportError, OSError)


def missing(package: object, extra: str, user: str, remedy: str = "") -> ConfigError:
    """The error for a package that is not installed: who needs it, and which extra of molora installs it."""
    return ConfigError(f"{user} needs the package {package}: pip install 'molora[{extra}]'{remedy}")


def need(module: str, extra: str, user: str) -> ModuleType:
    """Import ``module``, which ``user`` needs and the extra ``extra`` of molora installs.

    Raises:
        ConfigError: it, or a package that it needs itself, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as e:
        raise missing(e.name, extra, user) from e


def package_folder(package: str, module: str, extra: str, user: str, remedy: str = "") -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        ConfigError: it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise missing(package, extra, user, remedy)
    return Path(next(iter(spec.submodule_search_locations)))
