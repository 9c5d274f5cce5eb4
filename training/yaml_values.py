"""YAML as people who write learning rates expect it; plain values only."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from molora.errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml carries no types
    """Safe YAML that reads 1e-3 as a number, as YAML 1.2 and everyone who writes a learning rate do."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), [*"-+.0123456789"]
)


def parse_yaml(text: str, name: str) -> Any:
    """The value that ``text`` writes; ConfigError with ``name`` when it is not YAML."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except yaml.YAMLError as e:
        raise ConfigError(f"{name} is not YAML: {e}") from e


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; ConfigError when it does not, or is not there."""
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; expected a YAML file of arguments (see training/configs/)")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not UTF-8 text") from e
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: got {type(values).__name__}, expected a mapping of argument names to values")
    return values
