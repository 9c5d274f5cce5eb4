"""What a mixture is, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from molora.config.banks import AlwaysOn, name_faults
from molora.config.options import (
    MOST,
    BalanceConfig,
    BalanceOptions,
    GateConfig,
    GateOptions,
    PenaltyOptions,
    RouterConfig,
    RouterOptions,
)
from molora.config.strict import PerLayer, Strict, at_least, choice, shown, unwritten

__all__ = [
    "BalanceConfig",
    "GateConfig",
    "MoloraConfig",
    "PerLayer",
    "Placement",
    "RouterConfig",
    "per_layer",
]


def per_layer(value: PerLayer, index: int | None, num_layers: int) -> int:
    """Value of layer ``index`` of ``num_layers``: ``v[i * n // L]`` for a tuple of n, the last without an index."""
    if isinstance(value, int):
        return value
    return value[-1] if index is None else value[index * len(value) // num_layers]


@dataclass(frozen=True, kw_only=True)
class Placement(Strict):
    """Which linears get which bank, router, gate and balance rule.

    ``select`` splits the targeted linears: ``ffn`` (those of feed-forward blocks), ``rest``, or ``all``.
    ``unit`` ``linear`` mixes the outputs of one linear, ``ffn`` the outputs of the whole feed-forward block.
    ``scale_by``: alpha over ``r``, ``sqrt_r`` or ``top_k``, times ``global_scale``. ``sampled``: per-layer tuples are
    a recipe's default, so one longer than the model is sampled and not refused. ``init_lora_weights``: a key of
    ``INITIALISERS``. ``penalties``: terms of the loss on the experts' parameters, each by a key of ``PENALTIES``.
    ``bank``: the kind of the experts' bank, a key of ``BANKS``; ``always``: experts beside them that are always on.

    What depends on an entry of a table is checked by :func:`molora.recipes.check.entry_faults`.
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
    router: RouterOptions = field(default_factory=RouterConfig)
    gate: GateOptions = field(default_factory=GateConfig)
    balance: tuple[BalanceOptions, ...] = ()
    train_experts: bool = True
    imported: bool = False
    sampled: bool = False
    penalties: tuple[PenaltyOptions, ...] = unwritten(())
    bank: str = unwritten("plain")
    always: tuple[AlwaysOn, ...] = unwritten(())

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = choice("unit", self.unit, ("linear", "ffn")) + choice("select", self.select, ("all", "ffn", "rest"))
        out += choice("scale_by", self.scale_by, ("r", "sqrt_r", "top_k"))
        out += at_least("num_experts", self.num_experts, 1, MOST) + at_least("r", self.r, 1, MOST)
        if self.lora_alpha <= 0:
            out.append(f"lora_alpha: got {self.lora_alpha}, expected a value above 0")
        if not 0 <= self.lora_dropout < 1:
            out.append(f"lora_dropout: got {self.lora_dropout}, expected a value in [0, 1)")
        if self.imported and self.rank_one:
            out.append("rank_one: got imported=True, expected experts of their own ranks")
        out += name_faults(tuple(a.name for a in self.always))
        return out + self._unit_faults() + self._gate_faults() + self._balance_faults()

    def _unit_faults(self) -> list[str]:
        out, router, gate = [], self.router, self.gate
        if router.scope == "block" and self.select != "ffn":
            out.append(f"select={self.select!r}: got a router of scope 'block', expected select='ffn' with it")
        if self.select == "ffn" and router.scope != "block" and (self.unit, router.scope) != ("linear", "module"):
            out.append(f"select='ffn', unit={self.unit!r}: got a router of scope {router.scope!r}, expected 'block'")
        if self.unit == "ffn" and (self.select != "ffn" or router.dropped_input):
            out.append("unit='ffn': needs select='ffn' and a router that chooses and sees the whole input")
        if router.scope == "model":
            one_per_layer = isinstance(gate.top_k, tuple) or isinstance(self.num_experts, tuple) or self.rank_one
            if one_per_layer or gate.jitter or gate.partition != 1:
                out.append(
                    "a router of scope 'model': needs one num_experts and one top_k for all layers, and no rank_one, "
                    "capacity, jitter or partition"
                )
        return out

    def _gate_faults(self) -> list[str]:
        out = []
        experts = self.r if self.rank_one else self.num_experts
        counts = (experts if isinstance(experts, tuple) else (experts,)) or (1,)
        ks = self.gate.top_k if isinstance(self.gate.top_k, tuple) else (self.gate.top_k or 1,)
        if not self.imported and isinstance(experts, int) and max(ks, default=1) > experts:
            out.append(f"top_k: got {shown(max(ks))} with {shown(experts)} experts, expected at most that many")
        if not self.imported and self.gate.partition > 0 and any(c % self.gate.partition for c in counts):
            out.append(f"partition: got {self.gate.partition}, expected a divisor of the experts {shown(experts)}")
        if self.imported and self.gate.partition != 1:
            out.append(f"partition: got {self.gate.partition}, expected 1 for ready-made experts")
        return out

    def _balance_faults(self) -> list[str]:
        out = []
        for name, rules in (("balance", self.balance), ("penalties", self.penalties)):
            if len(set(rules)) < len(rules):
                out.append(f"{name}: got the same rule twice, expected each once")
        return out


@dataclass(frozen=True, kw_only=True)
class MoloraConfig(Strict):
    """A whole mixture: a recipe's name, its placements, and what they share. Made by ``molora.recipes.<name>()``."""

    recipe: str
    placements: tuple[Placement, ...]
    target_modules: str | tuple[str, ...] = "all-linear"
    target_parameters: tuple[str, ...] = ()
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
        both = sorted({a.name for p in self.placements for a in p.always} & {*names})
        if both:
            out.append(f"always: got {both}, which are adapters too, expected other names")
        if any(i < 0 for i in self.layers_to_transform):
            out.append(f"layers_to_transform: got {self.layers_to_transform}, expected indices from 0")
        for p in self.placements:
            ks = p.gate.top_k if isinstance(p.gate.top_k, tuple) else (p.gate.top_k or 1,)
            if p.imported and names and max(ks, default=1) > len(names):
                out.append(f"top_k: got {shown(max(ks))} with {len(names)} adapters, expected at most their number")
        for name, pairs, high in (
            ("rank_pattern", self.rank_pattern, MOST),
            ("alpha_pattern", self.alpha_pattern, 3e38),
        ):
            for key, value in pairs:
                low = 1 if name == "rank_pattern" else 1e-30
                out += at_least(f"{name}[{key!r}]", value, low, high)
        out += self._parameter_faults()
        selects = [p.select for p in self.placements]
        if len(set(selects)) < len(selects) or ("all" in selects and len(selects) > 1):
            out.append(f"placements: got select={selects}, expected 'all' alone, or 'ffn' and 'rest' once each at most")
        given = [n for n in ("init_from", "rank_pattern", "alpha_pattern") if getattr(self, n)]
        if given and any(p.imported for p in self.placements):
            out.append(f"{', '.join(given)}: got values for experts that are ready-made, expected none")
        return out + at_least("init_noise", self.init_noise, 0)

    def _parameter_faults(self) -> list[str]:
        """Why the base's own experts cannot be adapted as the config says; see :mod:`molora.layers.stacked`."""
        if not self.target_parameters:
            return []
        what, out = "target_parameters", []
        for p in self.placements:
            if p.always:
                out.append(f"{what}: got always={[a.name for a in p.always]}, expected none: they are for linears")
            if p.lora_dropout:
                out.append(
                    f"{what}: got lora_dropout={p.lora_dropout}, expected 0: B A is added to the weight itself, and "
                    "never sees the input that dropout is for"
                )
        return out

    def without_folders(self) -> MoloraConfig:
        """The mixture as others may see it: named by its adapters, not by where on this machine they came from."""
        return self.replace(adapters=tuple((name, "") for name, _ in self.adapters), init_from="")
