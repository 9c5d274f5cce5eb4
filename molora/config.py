"""What a mixture is, as frozen data: JSON round trip, strict, every fault of a config named at once."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from molora.errors import ConfigError, nearest

__all__ = [
    "BalanceConfig",
    "GateConfig",
    "MoloraConfig",
    "PerLayer",
    "Placement",
    "RouterConfig",
    "SiteConfig",
    "per_layer",
]

PerLayer = int | tuple[int, ...]
T = TypeVar("T", bound="Strict")


def per_layer(value: PerLayer, index: int | None, num_layers: int) -> int:
    """Value of layer ``index`` of ``num_layers``: ``v[i * n // L]`` for a tuple of n, the last without an index."""
    if isinstance(value, int):
        return value
    return value[-1] if index is None else value[index * len(value) // num_layers]


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


def _choice(name: str, value: str, allowed: Sequence[str]) -> list[str]:
    return [] if value in allowed else [f"{name}: got {value!r}, expected one of {', '.join(map(repr, allowed))}"]


def _at_least(name: str, value: PerLayer | float | None, low: float) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, tuple) else (value,)
    if values and all(v >= low for v in values):
        return []
    return [f"{name}: got {value!r}, expected {'values' if isinstance(value, tuple) else 'a value'} of at least {low}"]


@dataclass(frozen=True, kw_only=True)
class GateConfig(Strict):
    """From router logits to weights: activation, selection, renormalisation.

    ``renormalize``: ``none``; ``one`` (chosen weights sum to 1); ``top_k`` (sum to K); ``softmax`` (softmax over the
    chosen values). ``hard_weight``: the weight of a chosen expert is its probability (``prob``), the constant
    ``one``, or one in the forward and the probability in the backward (``ste``). ``partition``: ranks that share a
    logit. ``capacity``: tokens an expert accepts per sequence; later tokens get nothing from it.
    """

    activation: str = "softmax"
    top_k: PerLayer | None = None
    top_p: float | None = None
    temperature: float = 1.0
    renormalize: str = "none"
    hard_weight: str = "prob"
    partition: int = 1
    bias_in_weight: bool = False
    jitter: float = 0.0
    capacity: int | None = None

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = _choice("activation", self.activation, ("softmax", "sigmoid", "identity"))
        out += _choice("renormalize", self.renormalize, ("none", "one", "top_k", "softmax"))
        out += _choice("hard_weight", self.hard_weight, ("prob", "one", "ste"))
        out += _at_least("top_k", self.top_k, 1) + _at_least("partition", self.partition, 1)
        out += _at_least("capacity", self.capacity, 1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            out.append(f"top_p: got {self.top_p}, expected a share in (0, 1]")
        if self.top_p is not None and self.top_k is not None:
            out.append("top_k and top_p: got both, expected one of them")
        if self.temperature <= 0:
            out.append(f"temperature: got {self.temperature}, expected a value above 0")
        if not 0 <= self.jitter < 1:
            out.append(f"jitter: got {self.jitter}, expected a value in [0, 1)")
        if self.hard_weight != "prob" and self.top_k != 1:
            out.append(f"hard_weight={self.hard_weight!r}: needs top_k=1, got top_k={self.top_k!r}")
        return out

    def constant_weight(self) -> bool:
        """Whether a chosen expert's weight is 1 whatever the logits: no gradient reaches the router through it."""
        return self.top_k == 1 and (
            self.renormalize == "one" and self.hard_weight == "prob" or self.hard_weight == "one"
        )


@dataclass(frozen=True, kw_only=True)
class RouterConfig(Strict):
    """Who computes the logits. ``kind`` is a key of ``ROUTERS``; ``scope``: one per ``module``, ``block`` or ``model``.

    ``init_std`` None means nn.Linear's own (kaiming uniform). ``dropped_input``: the router sees the dropped input.
    ``depth size dropout layerwise scaling_pass_value`` belong to the model-wide head (X-LoRA).
    """

    kind: str = "linear"
    scope: str = "module"
    bias: bool = False
    init_std: float | None = None
    dropped_input: bool = False
    train: bool = True
    depth: int = 1
    size: int = 2048
    dropout: float = 0.0
    layerwise: bool = True
    scaling_pass_value: float = 0.0

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = _choice("scope", self.scope, ("module", "block", "model"))
        out += (
            _at_least("depth", self.depth, 1)
            + _at_least("size", self.size, 1)
            + _at_least("init_std", self.init_std, 0)
        )
        if not 0 <= self.dropout < 1:
            out.append(f"dropout: got {self.dropout}, expected a value in [0, 1)")
        return out


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(Strict):
    """One balance rule (a key of ``BALANCES``) and its pooling; ``routers/balance.py`` has the formulas.

    ``scope`` ``sequence``: per row, additive over rows and micro-batches; ``batch``: the forward's own tokens.
    ``pooling`` ``router | layer | model``: over what f and P are averaged before they are multiplied.
    ``count`` ``argmax | picks | slots``: f from the first choice; from all choices, sum 1; from all choices, sum K.
    ``factor`` ``experts``: times E, so 1 at balance; ``one``: as it is. ``reduction``: mean or sum over the pools.
    """

    kind: str = "switch"
    coef: float = 0.01
    scope: str = "sequence"
    pooling: str = "router"
    count: str = "picks"
    factor: str = "experts"
    reduction: str = "mean"
    mask_padding: bool = True
    shift: bool = False
    rate: float = 0.0

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = _choice("scope", self.scope, ("sequence", "batch"))
        out += _choice("pooling", self.pooling, ("router", "layer", "model"))
        out += _choice("count", self.count, ("argmax", "picks", "slots"))
        out += _choice("factor", self.factor, ("experts", "one")) + _choice(
            "reduction", self.reduction, ("mean", "sum")
        )
        return out + _at_least("coef", self.coef, 0) + _at_least("rate", self.rate, 0)


@dataclass(frozen=True, kw_only=True)
class Placement(Strict):
    """Which linears get which bank, router, gate and balance rule.

    ``select`` splits the targeted linears: ``ffn`` (those of feed-forward blocks), ``rest``, or ``all``.
    ``unit`` ``linear`` mixes the outputs of one linear, ``ffn`` the outputs of the whole feed-forward block.
    ``scale_by``: alpha over ``r``, ``sqrt_r`` or ``top_k``, times ``global_scale``. ``sampled``: per-layer tuples are
    a recipe's default, so one longer than the model is sampled and not refused.
    """

    unit: str = "linear"
    select: str = "all"
    num_experts: PerLayer = 1
    r: PerLayer = 8
    rank_one: bool = False
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    scale_by: str = "r"
    global_scale: float = 1.0
    init_lora_weights: str = "kaiming"
    router: RouterConfig = field(default_factory=RouterConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    balance: tuple[BalanceConfig, ...] = ()
    train_experts: bool = True
    imported: bool = False
    sampled: bool = False

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = _choice("unit", self.unit, ("linear", "ffn")) + _choice("select", self.select, ("all", "ffn", "rest"))
        out += _choice("scale_by", self.scale_by, ("r", "sqrt_r", "top_k"))
        out += _choice("init_lora_weights", self.init_lora_weights, ("kaiming", "gaussian", "random"))
        out += _at_least("num_experts", self.num_experts, 1) + _at_least("r", self.r, 1)
        if self.lora_alpha <= 0:
            out.append(f"lora_alpha: got {self.lora_alpha}, expected a value above 0")
        if not 0 <= self.lora_dropout < 1:
            out.append(f"lora_dropout: got {self.lora_dropout}, expected a value in [0, 1)")
        if self.unit == "ffn" and (self.select != "ffn" or self.router.scope != "block"):
            out.append("unit='ffn': needs select='ffn' and a router of scope 'block'")
        out += self._gate_faults()
        return out

    def _gate_faults(self) -> list[str]:
        out = []
        experts = self.r if self.rank_one else self.num_experts
        counts = experts if isinstance(experts, tuple) else (experts,)
        ks = self.gate.top_k if isinstance(self.gate.top_k, tuple) else (self.gate.top_k or 1,)
        if not self.imported and isinstance(experts, int) and max(ks) > max(counts):
            out.append(f"top_k: got {max(ks)} with {max(counts)} experts, expected at most the number of experts")
        if self.rank_one and any(c % self.gate.partition for c in counts):
            out.append(f"rank_partition: got {self.gate.partition}, expected a divisor of the total rank {experts}")
        taught = any(b.coef > 0 or b.rate > 0 for b in self.balance if b.kind != "z")
        several = max(counts) > 1 or self.imported
        if self.gate.constant_weight() and self.router.kind != "fixed" and self.router.train and several and not taught:
            out.append(
                "top_k=1: the chosen expert's weight is the constant 1, so the task loss gives the router no gradient;"
                " use a balance or gate loss above 0, or hard_weight='prob' or 'ste'"
            )
        return out


@dataclass(frozen=True, kw_only=True)
class MoloraConfig(Strict):
    """A whole mixture: a recipe's name, its placements, and what they share. Made by ``molora.recipes.<name>()``."""

    recipe: str
    placements: tuple[Placement, ...]
    target_modules: str | tuple[str, ...] = "all-linear"
    exclude_modules: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    adapters: tuple[tuple[str, str], ...] = ()
    init_from: str = ""
    init_noise: float = 0.0
    kernel: str = "auto"
    released: bool = False

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = [] if self.placements else ["placements: got none, expected at least one"]
        names = [n for n, _ in self.adapters]
        bad = [n for n in names if not n or "." in n or "/" in n or not n.isprintable()]
        if bad:
            out.append(f"adapters: got the names {bad}, expected non-empty names without dots, slashes or line breaks")
        if len(set(names)) < len(names):
            out.append(f"adapters: got {names}, expected distinct names")
        if any(p.imported for p in self.placements) != bool(names):
            out.append("adapters: expected at least one, as {name: folder}, for recipes that mix ready-made adapters")
        if any(i < 0 for i in self.layers_to_transform):
            out.append(f"layers_to_transform: got {self.layers_to_transform}, expected indices from 0")
        for p in self.placements:
            ks = p.gate.top_k if isinstance(p.gate.top_k, tuple) else (p.gate.top_k or 1,)
            if p.imported and max(ks) > len(names):
                out.append(f"top_k: got {max(ks)} with {len(names)} adapters, expected at most their number")
        if sum(p.router.scope == "model" for p in self.placements) > 1:
            out.append("placements: got more than one model-wide router, expected at most one")
        return out + _at_least("init_noise", self.init_noise, 0)


@dataclass(frozen=True, kw_only=True)
class SiteConfig(Strict):
    """One adapted module, resolved: everything needed to build it again without looking at names or patterns.

    ``role``: ``linear``; ``up`` / ``down`` of an ffn unit; ``rows``, a feed-forward module run once per chosen expert.
    ``block``: path that names the shared router's block, ``lead`` the site that owns it. ``layer``: -1 without an
    index. ``mask``: the forward argument that marks this stream's real tokens, empty for none. ``index``: position
    among the sites of a model-wide router. ``ranks`` and ``scales``: one value for all experts, or one each.
    """

    path: str
    placement: int
    role: str = "linear"
    block: str = ""
    lead: bool = True
    layer: int = -1
    mask: str = ""
    index: int = 0
    in_features: int
    out_features: int
    num_experts: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    top_k: int | None = None

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = _choice("role", self.role, ("linear", "up", "down", "rows"))
        for name in ("in_features", "out_features", "num_experts"):
            out += _at_least(name, getattr(self, name), 1)
        for name, values in (("ranks", self.ranks), ("scales", self.scales)):
            if len(values) not in (0, 1, self.num_experts):
                out.append(f"{name}: got {len(values)} values for {self.num_experts} experts, expected 1 or one each")
        if any(r < 0 or r > 2**20 for r in self.ranks):
            out.append(f"ranks: got {self.ranks}, expected values from 0 to {2**20}")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            out.append(f"top_k: got {self.top_k} with {self.num_experts} experts")
        return out

    def expert_ranks(self) -> tuple[int, ...]:
        """The rank of each expert; empty for a site without a bank of its own."""
        return self.ranks * self.num_experts if len(self.ranks) == 1 else self.ranks

    def expert_scales(self) -> tuple[float, ...]:
        """The factor of each expert."""
        return self.scales * self.num_experts if len(self.scales) == 1 else self.scales
