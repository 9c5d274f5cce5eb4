"""The parts of a placement, as frozen data: who computes the weights, how they are chosen, what balances them.

Each part is a family of options (:class:`molora.config.strict.ByKind`): what every entry of its table has, and below
it the class that the entries of molora share. A new entry shares that class, or brings a subclass of the family.
"""

from __future__ import annotations

from dataclasses import dataclass

from molora.config.strict import ByKind, PerLayer, at_least, choice, shown, unwritten

__all__ = [
    "MOST",
    "BalanceConfig",
    "BalanceOptions",
    "GateConfig",
    "GateOptions",
    "PenaltyConfig",
    "PenaltyOptions",
    "RouterConfig",
    "RouterOptions",
]

MOST = 2**20  # of experts, ranks and widths: a bound for configs from files, above any that fits a machine
MOST_LINEARS = 64  # in a model-wide router


@dataclass(frozen=True, kw_only=True)
class GateOptions(ByKind):
    """What every gate has. ``kind`` is a key of ``GATES``.

    ``top_k``: experts chosen a token, None for another rule. ``partition``: ranks that share a logit. ``jitter``: the
    router's input is multiplied by U(1 - jitter, 1 + jitter) in training.
    """

    kind: str = unwritten("choice")
    top_k: PerLayer | None = None
    partition: int = 1
    jitter: float = 0.0

    def faults(self) -> list[str]:
        """Values out of range."""
        out = at_least("top_k", self.top_k, 1, MOST) + at_least("partition", self.partition, 1, MOST)
        return out if 0 <= self.jitter < 1 else [*out, f"jitter: got {self.jitter}, expected a value in [0, 1)"]

    def constant_weight(self) -> bool:
        """Whether some layer's chosen expert has weight 1 whatever the logits: its router gets no gradient from it."""
        return False


@dataclass(frozen=True, kw_only=True)
class GateConfig(GateOptions):
    """From router logits to weights: activation, selection, renormalisation.

    ``renormalize``: ``none``; ``one`` (chosen weights sum to 1); ``top_k`` (sum to K); ``softmax`` (softmax over the
    chosen values). ``hard_weight``: the weight of a chosen expert is its probability (``prob``), the constant
    ``one``, or one in the forward and the probability in the backward (``ste``). ``capacity``: tokens an expert
    accepts per sequence; later tokens get nothing from it.
    """

    activation: str = "softmax"
    top_p: float | None = None
    temperature: float = 1.0
    renormalize: str = "none"
    hard_weight: str = "prob"
    bias_in_weight: bool = False
    capacity: int | None = None

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = choice("activation", self.activation, ("softmax", "sigmoid", "identity"))
        out += choice("renormalize", self.renormalize, ("none", "one", "top_k", "softmax"))
        out += choice("hard_weight", self.hard_weight, ("prob", "one", "ste"))
        out += super().faults()
        out += at_least("capacity", self.capacity, 1) + at_least("temperature", self.temperature, 1e-6)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            out.append(f"top_p: got {self.top_p}, expected a share in (0, 1]")
        if self.top_p is not None and self.top_k is not None:
            out.append("top_k and top_p: got both, expected one of them")
        if self.hard_weight != "prob" and self.top_k != 1:
            out.append(f"hard_weight={self.hard_weight!r}: needs top_k=1, got top_k={shown(self.top_k)}")
        return out + self._combinations()

    def _combinations(self) -> list[str]:
        out = []
        if self.top_k is None and (self.renormalize != "none" or self.capacity is not None or self.bias_in_weight):
            out.append("renormalize, capacity, bias_in_weight: are about chosen experts, expected a top_k with them")
        if self.top_p is not None and self.activation != "softmax":
            out.append(f"top_p: got activation={self.activation!r}, expected 'softmax': a share needs probabilities")
        if self.activation == "identity" and self.renormalize in ("one", "top_k"):
            out.append(
                f"renormalize={self.renormalize!r}: got activation='identity', whose sum may be zero or negative"
            )
        return out

    def constant_weight(self) -> bool:
        """A choice of one that is renormalised, or counts as 1."""
        ks = self.top_k if isinstance(self.top_k, tuple) else (self.top_k,)
        return 1 in ks and (self.renormalize != "none" or self.hard_weight == "one")


@dataclass(frozen=True, kw_only=True)
class RouterOptions(ByKind):
    """What every router has. ``kind`` is a key of ``ROUTERS``; ``scope``: one per ``module``, ``block`` or ``model``.

    ``dropped_input``: the router sees the dropped input. ``train``: whether it is trained.
    """

    kind: str = "linear"
    scope: str = "module"
    dropped_input: bool = False
    train: bool = True

    def faults(self) -> list[str]:
        """Values out of range."""
        return choice("scope", self.scope, ("module", "block", "model"))


@dataclass(frozen=True, kw_only=True)
class RouterConfig(RouterOptions):
    """Options of the linear router, and of the model-wide head.

    ``init_std`` None means nn.Linear's own (kaiming uniform).
    ``depth size dropout layerwise scaling_pass_value`` belong to the model-wide head (X-LoRA).
    """

    bias: bool = False
    init_std: float | None = None
    depth: int = 1
    size: int = 2048
    dropout: float = 0.0
    layerwise: bool = True
    scaling_pass_value: float = 0.0

    def faults(self) -> list[str]:
        """Values out of range."""
        out = super().faults()
        out += at_least("depth", self.depth, 1, MOST_LINEARS) + at_least("size", self.size, 1, MOST)
        out += at_least("init_std", self.init_std, 0)
        if not 0 <= self.dropout < 1:
            out.append(f"dropout: got {self.dropout}, expected a value in [0, 1)")
        return out


@dataclass(frozen=True, kw_only=True)
class BalanceOptions(ByKind):
    """What every balance rule has. ``kind`` is a key of ``BALANCES``; see :mod:`molora.routers.balance`.

    ``scope`` ``sequence``: per row, additive over rows and micro-batches; ``batch``: the forward's own tokens.
    ``pooling`` ``router | layer | model``: over what the observed tensors are averaged before the rule's formula.
    ``reduction``: mean or sum over the pools. ``mask_padding``: not counting padding. ``rate``: of a rule that steers.
    """

    kind: str = "switch"
    coef: float = 0.01
    scope: str = "sequence"
    pooling: str = "router"
    reduction: str = "mean"
    mask_padding: bool = True
    rate: float = 0.0

    def faults(self) -> list[str]:
        """Values out of range."""
        out = choice("scope", self.scope, ("sequence", "batch"))
        out += choice("pooling", self.pooling, ("router", "layer", "model"))
        out += choice("reduction", self.reduction, ("mean", "sum"))
        return out + at_least("coef", self.coef, 0) + at_least("rate", self.rate, 0)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig(BalanceOptions):
    """Options of the Switch loss, the z-loss, the supervised gate loss and the loss-free bias.

    ``count`` ``argmax | picks | slots``: f from the first choice; from all choices, sum 1; from all choices, sum K.
    ``factor`` ``experts``: times E, so 1 at balance; ``one``: as it is. ``shift``: labels of the next token.
    """

    count: str = "picks"
    factor: str = "experts"
    shift: bool = False

    def faults(self) -> list[str]:
        """Values out of range."""
        out = super().faults() + choice("count", self.count, ("argmax", "picks", "slots"))
        return out + choice("factor", self.factor, ("experts", "one"))


@dataclass(frozen=True, kw_only=True)
class PenaltyOptions(ByKind):
    """What every penalty has. ``kind`` is a key of ``PENALTIES``; ``coef`` is its weight in the loss."""

    kind: str = "orthogonal"
    coef: float = 0.01

    def faults(self) -> list[str]:
        """Values out of range."""
        return at_least("coef", self.coef, 0)


@dataclass(frozen=True, kw_only=True)
class PenaltyConfig(PenaltyOptions):
    """Options of the penalties that need none of their own."""
