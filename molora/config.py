"""What a mixture is, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass, field

from molora.strict import PerLayer, Strict, at_least, choice

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
        out = choice("activation", self.activation, ("softmax", "sigmoid", "identity"))
        out += choice("renormalize", self.renormalize, ("none", "one", "top_k", "softmax"))
        out += choice("hard_weight", self.hard_weight, ("prob", "one", "ste"))
        out += at_least("top_k", self.top_k, 1) + at_least("partition", self.partition, 1)
        out += at_least("capacity", self.capacity, 1)
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
        out = choice("scope", self.scope, ("module", "block", "model"))
        out += (
            at_least("depth", self.depth, 1) + at_least("size", self.size, 1) + at_least("init_std", self.init_std, 0)
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
        out = choice("scope", self.scope, ("sequence", "batch"))
        out += choice("pooling", self.pooling, ("router", "layer", "model"))
        out += choice("count", self.count, ("argmax", "picks", "slots"))
        out += choice("factor", self.factor, ("experts", "one")) + choice("reduction", self.reduction, ("mean", "sum"))
        return out + at_least("coef", self.coef, 0) + at_least("rate", self.rate, 0)


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
        out = choice("unit", self.unit, ("linear", "ffn")) + choice("select", self.select, ("all", "ffn", "rest"))
        out += choice("scale_by", self.scale_by, ("r", "sqrt_r", "top_k"))
        out += choice("init_lora_weights", self.init_lora_weights, ("kaiming", "gaussian", "random"))
        out += at_least("num_experts", self.num_experts, 1) + at_least("r", self.r, 1)
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
        return out + at_least("init_noise", self.init_noise, 0)
