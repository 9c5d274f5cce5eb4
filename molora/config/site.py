"""A resolved site: what one adapted module is, without names or patterns left to match."""

from __future__ import annotations

from dataclasses import dataclass

from molora.activations import ACTIVATIONS
from molora.config.banks import SiteBank, name_faults
from molora.config.options import MOST
from molora.config.strict import Strict, at_least, choice, shown, unwritten

__all__ = ["SiteConfig"]

TAKES_BACK = "frozen_ranks"  # the kind of bank that the field takes_back means


@dataclass(frozen=True, kw_only=True)
class SiteConfig(Strict):
    """One adapted module, resolved: everything needed to build it again without looking at names or patterns.

    ``role``: ``linear``; ``up`` / ``down`` of an ffn unit; ``rows``, a feed-forward module run once per chosen expert;
    ``parameter``, stacked weights of ``num_experts`` experts of the base, each with a LoRA of its own: ``path`` is the
    parameter's, and ``transposed`` says that each weight is stored as (in_features, out_features).
    ``act`` and ``gated``: on the sites of an ffn unit that is ``act(u) * v``, the activation, and which site makes u.
    ``block``: path that names the shared router's block, ``lead`` the site that owns it. ``layer``: -1 without an
    index. ``mask``: the forward argument that marks this stream's real tokens, empty for none. ``index``: position
    among the sites of a model-wide router. ``ranks`` and ``scales``: one value for all experts, or one each.
    ``bank``: the kind of its bank, a key of ``BANKS``; ``takes_back``: it is ``frozen_ranks``, in the words of the
    first folders: each expert has as many frozen ranks again, which take its start back. ``banks``: the banks
    beside it that are always on.
    """

    path: str
    placement: int
    role: str = "linear"
    transposed: bool = False
    act: str = ""
    gated: bool = False
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
    takes_back: bool = False
    bank: str = unwritten("plain")
    banks: tuple[SiteBank, ...] = unwritten(())

    def faults(self) -> list[str]:
        """Values out of range and options that contradict each other."""
        out = choice("role", self.role, ("linear", "up", "down", "rows", "parameter"))
        out += choice("act", self.act, ("", *ACTIVATIONS))
        for name in ("in_features", "out_features", "num_experts"):
            out += at_least(name, getattr(self, name), 1, 2**32 if name != "num_experts" else MOST)
        for name, values in (("ranks", self.ranks), ("scales", self.scales)):
            if len(values) not in (0, 1, self.num_experts):
                out.append(f"{name}: got {len(values)} values for {self.num_experts} experts, expected 1 or one each")
        if self.ranks:
            out += at_least("ranks", self.ranks, 0, MOST)
        if self.role == "parameter" and (len(self.ranks), len(self.scales)) != (1, 1):
            out.append(f"{self.path[:200]}: got a parameter's experts of several ranks or scales, expected one of each")
        if self.takes_back and len(set(self.ranks)) != 1:
            out.append(f"takes_back: got ranks {shown(self.ranks)}, expected one rank for all experts")
        if self.takes_back and self.bank not in (SiteConfig.bank, TAKES_BACK):
            out.append(
                f"bank: got {shown(self.bank)} with a start that is taken back, expected 'plain' or {TAKES_BACK!r}"
            )
        out += name_faults(tuple(b.name for b in self.banks))
        if self.banks and not (self.ranks and self.role in ("linear", "up", "down")):
            out.append(f"banks: got always-on banks on {self.path[:200]}, expected them on a linear with experts")
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            out.append(f"top_k: got {self.top_k} with {self.num_experts} experts")
        return out

    def stacked(self) -> tuple[int, int, int]:
        """The shape of the parameter of a site of role ``parameter``."""
        widths = self.out_features, self.in_features
        return (self.num_experts, *(widths[::-1] if self.transposed else widths))

    def expert_ranks(self) -> tuple[int, ...]:
        """The rank of each expert; empty for a site without a bank of its own."""
        return self.ranks * self.num_experts if len(self.ranks) == 1 else self.ranks

    def total_rank(self) -> int:
        """The sum of the experts' ranks."""
        return sum(self.ranks) * (self.num_experts if len(self.ranks) == 1 else 1)

    def expert_scales(self) -> tuple[float, ...]:
        """The factor of each expert."""
        return self.scales * self.num_experts if len(self.scales) == 1 else self.scales

    @property
    def kind(self) -> str:
        """The kind of its bank, a key of ``BANKS``."""
        return TAKES_BACK if self.takes_back else self.bank

    def of_kind(self, kind: str) -> SiteConfig:
        """The same site with a bank of another kind, in the way in which folders write it."""
        back = kind == TAKES_BACK
        return self.replace(takes_back=back, bank="plain" if back else kind)

    def always(self) -> dict[str, SiteConfig]:
        """What each of its always-on banks is made from, by name: the same linear with a single expert."""
        out = {}
        for b in self.banks:
            own = self.replace(num_experts=1, ranks=(b.r,), scales=(b.scale,), top_k=None, banks=())
            out[b.name] = own.of_kind(b.bank)
        return out
