"""Which interventions an ablation makes: changed gates, and lesions of experts, alone or a domain's favourites.

A lesion takes away what training gave an expert, ``B_e = 0``, and leaves the routing as it is. At a single linear its
weight set to 0 would come to the same; of a block whose outputs are mixed that would take the frozen part, too, and say
how much the block is used rather than what the expert knows. Nothing is renormalised, else the other experts would grow
and a loss could come from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from molora.errors import ConfigError, nearest
from molora.eval.ablation.edits import GATES, Edit
from molora.eval.counting.specialisation import lift
from molora.eval.counting.stats import SiteInfo
from molora.eval.page.figures import site_labels
from molora.surgery.install import sites_of

__all__ = ["EACH", "MOST", "Intervention", "check_each", "favourites", "gates", "lesions", "names_of", "silenced"]

EACH = ("none", "favourite", "expert", "auto")
MOST = 64  # passes over the data that "auto" spends on single experts


@dataclass(frozen=True)
class Intervention:
    """One change: an edit of the routing by site path, an expert to silence by site path of its router, or the adapter
    off. ``about``: its own keys of the document.
    """

    name: str
    kind: str
    edits: Mapping[str, Edit] = field(default_factory=dict)
    silent: Mapping[str, int] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    off: bool = False

    @property
    def key(self) -> str:
        """Tells it apart from all others; names of sites may repeat."""
        return f"ablation: {self.name}, {dict(self.about)}" if self.about else f"ablation: {self.name}"


def check_each(each: str, domains: Sequence[str]) -> None:
    """Refuse lesions that cannot be made.

    Raises:
        ConfigError: for another name than those in ``EACH``, or favourites of a single domain.
    """
    if each not in EACH:
        raise ConfigError(f"each: got {each!r}, expected one of {', '.join(EACH)}{nearest(each, EACH)}")
    if each == "favourite" and len(domains) < 2:
        raise ConfigError(f"each='favourite': got the domains {list(domains)}, expected two or more to compare")


def names_of(adapters: Sequence[str], sites: Sequence[SiteInfo], given: Sequence[str] | None) -> tuple[str, ...] | None:
    """The names of the experts of every router: those ``given``, or the adapters' where every router mixes adapters.

    Raises:
        ConfigError: for given names that do not fit some router.
    """
    names = tuple(adapters if given is None else given)
    odd = next((s for s in sites if s.experts != len(names)), None)
    if given is None:
        return names if odd is None else None
    if odd is not None:
        raise ConfigError(
            f"expert_names: got {len(names)} names, but {odd.path} has {odd.experts} experts; expected one name for "
            "each expert of every router, or None"
        )
    return names


def gates(sites: Sequence[SiteInfo]) -> list[Intervention]:
    """The adapter off, and each edit of the gates at all routers."""
    paths = [s.path for s in sites]
    return [
        Intervention("off", "gates", off=True),
        *(Intervention(name, "gates", dict.fromkeys(paths, edit)) for name, edit in GATES.items()),
    ]


def lesions(
    sites: Sequence[SiteInfo],
    names: Sequence[str] | None,
    picks: Mapping[str, Mapping[str, Sequence[float]]],
    each: str,
) -> list[Intervention]:
    """The lesions that ``each`` asks for; ``picks``: assignments by site path, domain and expert."""
    domains, experts = list(next(iter(picks.values()))), _experts(sites, names)
    alone = each == "expert" or (each == "auto" and len(experts) <= MOST)
    compared = each in ("favourite", "auto") and len(domains) > 1
    return (experts if alone else []) + ([_favourites(name, sites, picks) for name in domains] if compared else [])


def _experts(sites: Sequence[SiteInfo], names: Sequence[str] | None) -> list[Intervention]:
    if names is not None:
        return [
            Intervention(
                f"expert {name}",
                "expert",
                silent=dict.fromkeys([s.path for s in sites], e),
                about={"site": None, "expert": e},
            )
            for e, name in enumerate(names)
        ]
    return [
        Intervention(
            f"layer {label} expert {e}" if label[:1].isdigit() else f"{label} expert {e}",
            "expert",
            silent={site.path: e},
            about={"site": i, "expert": e},
        )
        for i, (site, label) in enumerate(zip(sites, site_labels([s.path for s in sites]), strict=True))
        for e in range(site.experts)
    ]


def favourites(picks: Mapping[str, Sequence[float]]) -> dict[str, int | None]:
    """At one router, by domain, the expert of the highest lift; of equals the first; None where no token came."""
    counts_G1E = torch.tensor(list(picks.values()), dtype=torch.float64).unsqueeze(1)
    lift_GE = lift(counts_G1E, torch.arange(len(picks)), resamples=1)[0].squeeze(1)
    return {name: int(own.argmax()) if bool(own.any()) else None for name, own in zip(picks, lift_GE, strict=True)}


def _favourites(
    domain: str, sites: Sequence[SiteInfo], picks: Mapping[str, Mapping[str, Sequence[float]]]
) -> Intervention:
    chosen = {s.path: favourites(picks[s.path])[domain] for s in sites}
    silent = {path: e for path, e in chosen.items() if e is not None}
    return Intervention(f"favourites of {domain}", "favourites", silent=silent, about={"domain": domain})


@contextlib.contextmanager
def silenced(model: nn.Module, experts: Mapping[str, int]) -> Iterator[None]:
    """Within the block, the expert computes 0 at every linear that the routers at these sites feed; then as before.

    Raises:
        ConfigError: when an engine shards the experts' parameters.
    """
    modules = [m for _, m in sites_of(model).values()]
    of_block = {m.site.block: experts[m.site.path] for m in modules if m.site.block and m.site.path in experts}
    with torch.no_grad(), contextlib.ExitStack() as stack:
        for m in modules:
            expert = experts.get(m.site.path, of_block.get(m.site.block))
            bank = getattr(m, "bank", None)
            if expert is None or bank is None:
                continue
            if bank.in_pieces:
                raise ConfigError("ablation: an engine shards the experts; run it on the saved adapter in one process")
            for view in bank.views(expert).values():
                stack.callback(view.copy_, view.clone())
            bank.silence(expert)
        yield
