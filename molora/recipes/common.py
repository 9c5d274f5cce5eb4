"""What all recipes share: the common options, option checks, and the values that released code uses instead."""

from __future__ import annotations

import functools
import inspect
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from molora.config import BalanceConfig, MoloraConfig, Placement
from molora.config.strict import PerLayer, all_faults, matches, shown, type_name
from molora.errors import ConfigError, nearest
from molora.recipes.check import check
from molora.recipes.starts import start

__all__ = ["Common", "recipe"]

Recipe = Callable[..., MoloraConfig]


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every recipe takes; names and meaning are PEFT's where PEFT has them.

    ``r`` and ``lora_alpha``: rank and scale numerator of each expert. ``target_modules``: list of name endings, a
    regular expression over whole paths, or ``"all-linear"``. ``target_parameters``: name endings of parameters (E, a,
    b) that hold the base's own experts, which recipe ``lora`` adapts beside the linears
    (:mod:`molora.layers.stacked`); with ``target_modules=[]``, alone. ``rank_pattern`` / ``alpha_pattern``: name
    ending to value. ``balance_scope``: ``"sequence"`` (additive over rows) or ``"batch"`` (as published). ``kernel``: a
    key of ``KERNELS`` or ``"auto"``. ``released``: reproduce released code where it differs from the paper.

    ``init_lora_weights``: ``True`` (kaiming A, zero B); ``"gaussian"`` (normal A of std 1/r, zero B); ``"orthogonal"``
    (A and B both random, ``B A = 0``, even ranks); ``"mica"`` (B: for each expert a share of the weight's minor
    singular vectors, frozen; zero A); ``"pissa"`` or ``"pissa_niter_16"`` (B A: for each expert a share of the
    weight's principal part), ``"olora"`` (the same of its QR decomposition); ``False`` (B random too, for tests). PiSSA
    and OLoRA leave the base as it is: each expert takes its own start back, ``g s (B A - B0 A0) x``, by as many frozen
    ranks again, so it costs twice the ranks and one expert alone is PEFT's (with ``lora_dropout`` what is taken back is
    dropped out, too). All but ``True``, ``False`` and ``"gaussian"`` are PEFT's code (extra ``peft``). EVA, LoRA-GA and
    CorDA take data: ``init_eva``, ``init_lora_ga`` and ``init_corda`` of ``molora.initialisers.eva``, ``.lora_ga`` and
    ``.corda``, after ``convert``. LoftQ needs another base and is refused.
    """

    r: PerLayer = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    target_modules: str | list[str] | tuple[str, ...] = "all-linear"
    target_parameters: list[str] | tuple[str, ...] = ()
    exclude_modules: list[str] | tuple[str, ...] | str = ()
    layers_to_transform: int | list[int] | tuple[int, ...] = ()
    modules_to_save: list[str] | tuple[str, ...] = ()
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    balance_scope: str = "sequence"
    kernel: str = "auto"
    released: bool = False

    def placement(self, **own: Any) -> Placement:
        """A :class:`Placement` with the common rank, scale, dropout and initialiser filled in."""
        shared = {
            "r": as_tuple(self.r),
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "scale_by": "sqrt_r" if self.use_rslora else "r",
            "init_lora_weights": start(self.init_lora_weights),
        }
        return Placement(**{**shared, **own})

    def switch(self, coef: float, **own: Any) -> tuple[BalanceConfig, ...]:
        """The Switch balance rule, or nothing when the coefficient is 0."""
        if coef == 0:
            return ()
        return (BalanceConfig(**{"kind": "switch", "coef": coef, "scope": self.balance_scope, **own}),)

    def config(self, name: str, *placements: Placement, **own: Any) -> MoloraConfig:
        """The finished :class:`MoloraConfig` of recipe ``name``."""
        layers = self.layers_to_transform
        return MoloraConfig(
            recipe=name,
            placements=placements,
            target_modules=as_tuple(self.target_modules),
            target_parameters=_names(self.target_parameters),
            exclude_modules=_names(self.exclude_modules),
            layers_to_transform=(layers,) if isinstance(layers, int) else as_tuple(layers),
            modules_to_save=_names(self.modules_to_save),
            rank_pattern=tuple((self.rank_pattern or {}).items()),
            alpha_pattern=tuple((self.alpha_pattern or {}).items()),
            kernel=self.kernel,
            released=self.released,
            **own,
        )


def as_tuple(value: Any) -> Any:
    """Lists and sets become tuples (sets sorted), everything else stays."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value, key=repr))
    return tuple(value) if isinstance(value, list) else value


def _names(value: Any) -> Any:
    return (value,) if isinstance(value, str) else as_tuple(value)


def folders(name: str, adapters: Mapping[str, str | os.PathLike[str]] | None) -> tuple[tuple[str, str], ...]:
    """``{name: folder}`` as the config keeps it, in the given order (the order of the experts)."""
    if not adapters:
        raise ConfigError(
            f"adapters: got {adapters!r}, expected {{name: folder}} with at least one PEFT LoRA folder for {name}"
        )
    return tuple((k, os.fspath(v)) for k, v in adapters.items())


def recipe(
    *, released: Mapping[str, Any] | None = None, tiny: Mapping[str, Any] | None = None, **defaults: Any
) -> Callable[[Recipe], Recipe]:
    """Give a recipe the common options, with ``defaults`` of its own, and check options: names, types, then values.

    ``released`` holds what released code uses instead of the paper's values; it applies to options not given.
    ``tiny``, an attribute of the result, holds the options of a smallest config in which nothing is trivially right:
    several experts, more than one chosen where the method chooses several. The tests run every recipe of ``RECIPES``
    with them. Folders of ready-made adapters are left out; whoever uses the options gives ``adapters``.
    """

    def decorate(function: Recipe) -> Recipe:
        own = {k: p for k, p in inspect.signature(function).parameters.items() if k != "common"}
        shared = {f.name: defaults.get(f.name, f.default) for f in fields(Common)}
        params = [*own.values()] + [
            inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in shared.items() if k not in own
        ]
        hints = {**typing.get_type_hints(Common), **typing.get_type_hints(function)}

        @functools.wraps(function)
        def build(**options: Any) -> MoloraConfig:
            name, options = function.__name__, {k: as_tuple(v) for k, v in options.items()}
            _check_options(name, options, {k: hints[k] for k in (*own, *shared)})
            if options.get("released"):
                options = {**(released or {}), **options}
            with all_faults(name):
                common = Common(**{k: options.pop(k, v) for k, v in shared.items() if k not in own})
                config = function(common=common, **options)
                check(config)
            return config

        build.__signature__ = inspect.Signature(params)  # type: ignore[attr-defined]
        build.tiny = dict(tiny or {})  # type: ignore[attr-defined]
        return build

    return decorate


def _check_options(name: str, options: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    """ConfigError for unknown names (the nearest named) and values of a wrong type, all of them at once."""
    unknown = [f"{k!r}{nearest(k, hints)}" for k in options if k not in hints]
    known = f" Known: {', '.join(hints)}." if unknown else ""
    faults = [f"{name}: unknown option {', '.join(unknown)}{known}"] if unknown else []
    faults += [
        f"{name}: {k}: got {shown(v)}, expected {type_name(hints[k])}"
        for k, v in options.items()
        if k in hints and not matches(v, hints[k])
    ]
    if faults:
        raise ConfigError("\n".join(faults))
