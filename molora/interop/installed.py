"""PEFT, where something is left to it: an optional package, imported when it is used."""

from __future__ import annotations

from types import ModuleType

from molora.errors import ConfigError

__all__ = ["installed_peft"]


def installed_peft(user: str) -> ModuleType:
    """The package ``peft``.

    Raises:
        ConfigError: naming ``user`` and the extra, when it is not installed.
    """
    try:
        import peft
    except ModuleNotFoundError as e:
        raise ConfigError(f"{user} needs the package {e.name}: pip install 'molora[peft]'") from e
    return peft
