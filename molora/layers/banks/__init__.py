"""Banks: the packed experts of one linear. One file a kind of bank, and the table of them."""

from __future__ import annotations

from torch import nn

from molora.config import MoloraConfig, SiteConfig
from molora.errors import ConfigError, nearest
from molora.layers.banks.always_on import AlwaysOnBanks
from molora.layers.banks.base import Bank
from molora.layers.banks.frozen_ranks import FrozenRanksBank
from molora.layers.banks.plain import ExpertBank

__all__ = ["BANKS", "Bank", "bank_class", "banks_of", "banks_on", "config_faults", "expected_shapes", "site_faults"]
__all__ += ["trained_names", "words_of"]

BANKS: dict[str, type[Bank]] = {"plain": ExpertBank, "frozen_ranks": FrozenRanksBank}


def bank_class(site: SiteConfig) -> type[Bank]:
    """The entry that the bank of ``site`` is of.

    Raises:
        ConfigError: for a kind that is in no table.
    """
    faults = _unknown(site.kind)
    if faults:
        raise ConfigError(f"{site.path}: {faults[0]}")
    return BANKS[site.kind]


def banks_of(module: nn.Module) -> dict[str, Bank]:
    """The banks of a site by their names in it: ``bank``, whose experts are routed, and ``always.<name>``."""
    found: dict[str, Bank] = {}
    routed, always = getattr(module, "bank", None), getattr(module, "always", None)
    if isinstance(routed, Bank):
        found["bank"] = routed
    if isinstance(always, AlwaysOnBanks):
        found |= {f"always.{name}": bank for name, bank in always.banks().items()}
    return found


def config_faults(config: MoloraConfig) -> list[str]:
    """Kinds of banks that are in no table, and names that a module cannot have, in words."""
    out: list[str] = []
    for p in config.placements:
        out += [fault for kind in (p.bank, *(a.bank for a in p.always)) for fault in _unknown(kind)]
        out += [f"always: got the name {a.name!r}, expected another one" for a in p.always if _is_taken(a.name)]
    return list(dict.fromkeys(out))


def site_faults(site: SiteConfig) -> list[str]:
    """The same of a site, and what the entries have against its banks, in words."""
    out: list[str] = []
    for own in banks_on(site).values():
        out += _unknown(own.kind) or BANKS[own.kind].faults(own)
    return out + [f"banks: got the name {b.name!r}, expected another one" for b in site.banks if _is_taken(b.name)]


def banks_on(site: SiteConfig) -> dict[str, SiteConfig]:
    """What each bank of a site is made from, by its name in the site, as :func:`banks_of` gives them."""
    routed = {"bank": site} if site.ranks else {}
    return routed | {f"always.{name}": own for name, own in site.always().items()}


def expected_shapes(site: SiteConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of all banks on a site, by ``bank.<parameter>`` and ``always.<name>.<parameter>``."""
    return {
        f"{name}.{parameter}": shape
        for name, own in banks_on(site).items()
        for parameter, shape in bank_class(own).shapes(own).items()
    }


def trained_names(site: SiteConfig, train: bool, train_B: bool) -> set[str]:
    """Those of the same names that train; always-on banks do, whatever the placement and its start freeze."""
    flags = train, train_B
    out = {f"bank.{n}" for n in bank_class(site).trained(site, *flags)} if site.ranks else set()
    return out | {
        f"always.{name}.{n}" for name, own in site.always().items() for n in bank_class(own).trained(own, True)
    }


def words_of(site: SiteConfig) -> dict[str, str]:
    """The same names, to what the parameters hold in words: for plans and model cards."""
    out: dict[str, str] = {}
    for name, own in banks_on(site).items():
        entry = bank_class(own)
        aside = "" if own is site else ", always on"
        out |= {f"{name}.{n}": entry.words.get(n, n) + aside for n in entry.shapes(own)}
    return out


def _unknown(kind: str) -> list[str]:
    if kind in BANKS:
        return []
    return [f"bank: got {kind[:100]!r}, expected one of {', '.join(BANKS)}{nearest(kind[:100], BANKS)}"]


def _is_taken(name: str) -> bool:
    return hasattr(AlwaysOnBanks, name) or name in AlwaysOnBanks.ATTRIBUTES
