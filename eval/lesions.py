"""Which interventions an ablation makes: changed gates, and lesions of experts, alone or a domain's favourites."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from molora.errors import ConfigError, nearest
from molora.eval.edits import GATES, Edit, without
from molora.eval.figures import site_labels
from molora.eval.specialisation import lift
from molora.eval.stats import SiteInfo

__all__ = ["EACH", "MOST", "Intervention", "check_each", "favourites", "gates", "lesions", "names_of"]

EACH = ("none", "favourite", "expert", "auto")
MOST = 64  # passes over the data that "auto" spends on single experts


@dataclass(frozen=True)
class Intervention:
    """One way to route otherwise: an edit by site path, or the adapter off. ``about``: its own keys of the document."""

    name: str
    kind: str
    edits: Mapping[str, Edit] = field(default_factory=dict)
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
                dict.fromkeys([s.path for s in sites], functools.partial(without, expert=e)),
                {"site": None, "expert": e},
            )
            for e, name in enumerate(names)
        ]
    return [
        Intervention(
            f"layer {label} expert {e}" if label[:1].isdigit() else f"{label} expert {e}",
            "expert",
            {site.path: functools.partial(without, expert=e)},
            {"site": i, "expert": e},
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
    edits = {path: functools.partial(without, expert=e) for path, e in chosen.items() if e is not None}
    return Intervention(f"favourites of {domain}", "favourites", edits, {"domain": domain})
