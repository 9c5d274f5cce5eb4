"""Strict dataclasses: checked on construction, exact to and from plain JSON values, every fault named at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import re
import reprlib
import threading
import types
import typing
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast

from molora.errors import ConfigError, nearest

__all__ = [
    "ByKind",
    "PerLayer",
    "Strict",
    "all_faults",
    "at_least",
    "choice",
    "matches",
    "report",
    "shown",
    "type_name",
    "unwritten",
    "well_typed",
]

PerLayer = int | tuple[int, ...]
T = TypeVar("T", bound="Strict")
K = TypeVar("K", bound="ByKind")
V = TypeVar("V")
UNWRITTEN = "unwritten"  # in a field's metadata
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxtuple = _SHORT.maxlist = _SHORT.maxdict = 12
_LARGEST = 3e38  # just inside float32; NaN and infinity are not below it
_BLANKS: dict[Any, Any] = {str: "", int: 1, float: 1.0, bool: False}  # for a required value that is not there


def shown(value: object) -> str:
    """A short form of any value for a message; never raises."""
    try:
        return _SHORT.repr(value)
    except Exception:  # noqa: BLE001 a caller's own __repr__, or an integer too long to print
        return f"a {type(value).__name__}"


def matches(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type: no bool for an int, no NaN for a float; an int passes as a float."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(matches(value, a) for a in args)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1] is Ellipsis:
            return all(matches(v, args[0]) for v in value)
        return len(value) == len(args) and all(matches(v, a) for v, a in zip(value, args, strict=True))
    if origin is not None and issubclass(origin, Mapping):
        pairs = value.items() if isinstance(value, Mapping) else None
        return pairs is not None and all(matches(k, args[0]) and matches(v, args[1]) for k, v in pairs)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, origin or hint)


def type_name(hint: Any) -> str:
    """An annotation in words for a message."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(hint))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


class _Collector(threading.local):
    found: list[str] | None = None


_collector = _Collector()


@contextlib.contextmanager
def all_faults(title: str) -> Iterator[None]:
    """Within the block faulty configs are built all the same; at its end one ConfigError names the faults of all."""
    before, found = _collector.found, []  # type: ignore[var-annotated]
    _collector.found = found
    try:
        yield
    except ConfigError as e:
        found.append(str(e))
    finally:
        _collector.found = before
    if found:
        raise ConfigError(_listed(title, list(dict.fromkeys(found))))


def report(title: str, faults: Sequence[str]) -> None:
    """Faults found outside of a config class: kept for the end of a block of :func:`all_faults`, else raised now."""
    if faults and _collector.found is None:
        raise ConfigError(_listed(title, faults))
    if faults and _collector.found is not None:
        _collector.found += faults


def well_typed(config: Strict) -> bool:
    """Whether a config that was built within :func:`all_faults` holds values of its fields' types, all the way down."""
    if getattr(config, "_ill_typed", False):
        return False
    values = [getattr(config, f.name) for f in dataclasses.fields(config)]
    parts = [part for v in values for part in (v if isinstance(v, tuple) else (v,))]
    return all(well_typed(part) for part in parts if isinstance(part, Strict))


def _listed(title: str, faults: Sequence[str]) -> str:
    return f"{title} is not valid:\n- " + "\n- ".join(f.replace("\n", "\n  ") for f in faults)


@dataclass(frozen=True, kw_only=True)
class Strict:
    """Base of the config classes: checked on construction, exact to and from plain JSON values."""

    def __post_init__(self) -> None:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        faults = self._examine(values)
        if faults and _collector.found is None:
            raise ConfigError(_listed(type(self).__name__, faults))
        if faults and _collector.found is not None:
            _collector.found += faults
            hints = _hints(cast(Hashable, type(self)))
            object.__setattr__(self, "_ill_typed", not all(matches(v, hints[k]) for k, v in values.items()))

    def faults(self) -> list[str]:
        """Every rule that the (well-typed) values break, in words; an empty list when all is well."""
        return []

    @classmethod
    def _examine(cls, values: Mapping[str, Any]) -> list[str]:
        """Faults of type, and of the rules as far as the well-typed values go; the rest stands at its defaults."""
        hints, faults, replaced = _hints(cast(Hashable, cls)), [], []
        probe = object.__new__(cls)
        for f in dataclasses.fields(cls):
            value = values.get(f.name, dataclasses.MISSING)
            if value is not dataclasses.MISSING and not matches(value, hints[f.name]):
                faults.append(f"{f.name}: got {shown(value)}, expected {type_name(hints[f.name])}")
            elif value is not dataclasses.MISSING and not _holds_ill_typed(value):
                object.__setattr__(probe, f.name, value)
                continue
            replaced.append(f.name)
            if f.default is not dataclasses.MISSING:
                object.__setattr__(probe, f.name, f.default)
            elif f.default_factory is not dataclasses.MISSING:
                object.__setattr__(probe, f.name, f.default_factory())
            elif hints[f.name] in _BLANKS or typing.get_origin(hints[f.name]) is tuple:
                object.__setattr__(probe, f.name, _BLANKS.get(hints[f.name], ()))
            else:
                return faults  # the rules cannot be tried without it
        names = re.compile(r"\b(" + "|".join(replaced) + r")\b") if replaced else None
        return faults + [fault for fault in probe.faults() if names is None or not names.search(fault)]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values (dicts, lists, numbers, strings, booleans, None), in field order; see :func:`unwritten`."""
        values = {f: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {f.name: _plain(v) for f, v in values.items() if not (UNWRITTEN in f.metadata and v == f.default)}

    @classmethod
    def from_dict(cls: type[T], data: Mapping[str, Any]) -> T:
        """Rebuild from :meth:`to_dict`'s values.

        Raises:
            ConfigError: naming every unknown, missing, ill-typed or out-of-range entry at once.
        """
        if not isinstance(data, Mapping):
            raise ConfigError(f"{cls.__name__}: got {shown(data)}, expected an object with named entries")
        known = {f.name: f for f in dataclasses.fields(cls)}
        hints = _hints(cast(Hashable, cls))
        faults = [f"unknown entry {shown(k)}{nearest(str(k)[:80], known)}" for k in data if k not in known]
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
        if faults:
            raise ConfigError(_listed(cls.__name__, faults + cls._examine(values)))
        return cls(**values)

    def replace(self: T, **changes: Any) -> T:
        """A copy with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)


class ByKind(Strict):
    """Options of the entries of one table. Entries share the options of before, or have a class of their own.

    A family is ``class XOptions(ByKind)`` with the fields that every entry has, ``kind`` among them. A subclass with
    options of its own is ``class MineConfig(XOptions)`` with ``kind: str = "mine"``: entries of that kind are read
    from JSON as this class. All other kinds are read as the family's first subclass.
    """

    kind: str
    _classes: ClassVar[dict[str, type[ByKind]]]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if ByKind in cls.__bases__:
            cls._classes = {}
            return
        own = vars(cls).get("kind", "")  # of the first, which all kinds without a class of their own share, none
        cls._classes[str(own.default if isinstance(own, dataclasses.Field) else own)] = cls

    @classmethod
    def from_dict(cls: type[K], data: Mapping[str, Any]) -> K:
        """As :meth:`Strict.from_dict`; of the family, an instance of the class of the kind."""
        if ByKind not in cls.__bases__:
            return super().from_dict(data)
        kind = data.get("kind") if isinstance(data, Mapping) else None
        common = cls._classes[""]
        chosen = cls._classes.get(kind, common) if isinstance(kind, str) else common
        return cast(K, chosen.from_dict(data))


def unwritten(default: V) -> V:
    """A field that is not written where it has its default: files of before it was there stay as they are."""
    value: V = dataclasses.field(default=default, metadata={UNWRITTEN: True})
    return value


@functools.cache
def _hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cast(Hashable, cls))


def _holds_ill_typed(value: Any) -> bool:
    parts = value if isinstance(value, tuple) else (value,)
    return any(isinstance(v, Strict) and getattr(v, "_ill_typed", False) for v in parts)


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
        if len(inner) != len(value):
            return tuple(value)
        return tuple(_rich(v, h) for v, h in zip(value, inner, strict=True))
    if isinstance(hint, type) and issubclass(hint, Strict):
        return hint.from_dict(value)
    return value


def choice(name: str, value: str, allowed: Sequence[str]) -> list[str]:
    """The fault of a value that is not among ``allowed``, or nothing."""
    return [] if value in allowed else [f"{name}: got {shown(value)}, expected one of {', '.join(map(repr, allowed))}"]


def at_least(name: str, value: PerLayer | float | None, low: float, high: float = math.inf) -> list[str]:
    """The fault of a number, or one of a tuple, below ``low`` or above ``high``, or nothing; None passes."""
    if value is None:
        return []
    values = value if isinstance(value, tuple) else (value,)
    what = "values" if isinstance(value, tuple) else "a value"
    if not values or any(v < low for v in values):
        return [f"{name}: got {shown(value)}, expected {what} of at least {low}"]
    if any(v > high for v in values):
        return [f"{name}: got {shown(value)}, expected {what} of at most {high:.0f}"]
    return []
