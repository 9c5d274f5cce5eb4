"""Strict dataclasses: checked on construction, exact to and from plain JSON values, every fault named at once."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from molora.errors import ConfigError, nearest

__all__ = ["PerLayer", "Strict", "at_least", "choice"]

PerLayer = int | tuple[int, ...]
T = TypeVar("T", bound="Strict")


def _matches(value: object, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(_matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(_matches(v, a) for v, a in zip(value, args, strict=True))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _name(hint: Any) -> str:
    return getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint)  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class Strict:
    """Base of the config classes: checked on construction, exact to and from plain JSON values."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        faults = [
            f"{f.name}: got {getattr(self, f.name)!r}, expected {_name(hints[f.name])}"
            for f in dataclasses.fields(self)
            if not _matches(getattr(self, f.name), hints[f.name])
        ]
        faults = faults or self.faults()
        if faults:
            raise ConfigError(f"{type(self).__name__} is not valid:\n- " + "\n- ".join(faults))

    def faults(self) -> list[str]:
        """Every rule that the (well-typed) values break, in words; an empty list when all is well."""
        return []

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (dicts, lists, numbers, strings, booleans, None), in field order."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        """Rebuild from :meth:`to_dict`'s values.

        Raises:
            ConfigError: naming every unknown, missing, ill-typed or out-of-range entry at once.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__}: got {type(data).__name__}, expected an object with named entries")
        known = {f.name: f for f in dataclasses.fields(cls)}
        hints = typing.get_type_hints(cls)
        faults = [f"unknown entry {k!r}{nearest(str(k), known)}" for k in data if k not in known]
        values: dict[str, Any] = {}
        for name, f in known.items():
            if name not in data:
                if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
                    faults.append(f"{name}: missing")
                continue
            try:
                values[name] = _rich(data[name], hints[name])
            except ConfigError as e:
                faults.append(f"{name}: {e}")
        if not faults:
            return cls(**values)
        raise ConfigError(f"{cls.__name__} is not valid:\n- " + "\n- ".join(faults))

    def replace(self: T, **changes: Any) -> T:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


def _plain(value: Any) -> Any:
    if isinstance(value, Strict):
        return value.to_dict()
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _rich(value: Any, hint: Any) -> Any:
    """JSON values to the field's own: lists to tuples, objects to nested configs."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        tuples = [a for a in args if typing.get_origin(a) is tuple]
        return _rich(value, tuples[0]) if isinstance(value, list) and tuples else value
    if origin is tuple and isinstance(value, list):
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(_rich(v, h) for v, h in zip(value, inner, strict=False))
    if isinstance(hint, type) and issubclass(hint, Strict):
        return hint.from_dict(value)
    return value


def choice(name: str, value: str, allowed: Sequence[str]) -> list[str]:
    """The fault of a value that is not among ``allowed``, or nothing."""
    return [] if value in allowed else [f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}"]


def at_least(name: str, value: PerLayer | float | None, low: float) -> list[str]:
    """The fault of a number, or one of a tuple, below ``low``, or nothing; None passes."""
    if value is None:
        return []
    values = value if isinstance(value, tuple) else (value,)
    if values and all(v >= low for v in values):
        return []
    return [f"{name}: got {value!r}, expected {'values' if isinstance(value, tuple) else 'a value'} of at least {low}"]
