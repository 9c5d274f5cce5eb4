"""What an evaluation says, in words: balanced, collapsed, specialised, and does routing matter at all?

Every statement names the figure it rests on and what that figure is compared with.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from molora.errors import ConfigError

__all__ = ["FAILURES", "Statement", "collapsed_sites", "fails", "verdict"]

COLLAPSED = 0.1  # of the way from K experts, always the same, to all of them in even use
UNEVEN, VERY_UNEVEN = 1.0, 3.0  # MaxVio: the busiest expert has twice, four times its share
IDLE = 0.05, 0.25  # share of experts below a tenth of the even load
UNDECIDED = 0.98  # mean entropy of a token's probabilities over log E
SIGNIFICANT = 0.01
STRENGTH = ((0.05, "slightly"), (0.2, "clearly"), (2.0, "strongly"))  # information above chance, below each bound

Level = Literal["good", "warn", "bad", "unknown"]


class Statement(NamedTuple):
    """One finding. ``key``: balance, collapse, specialised or causal; ``title`` in a few words, ``text`` in full."""

    key: str
    level: Level
    title: str
    text: str


# What --fail-if takes: the statement that it looks at, and the levels that fail.
FAILURES: dict[str, tuple[str, tuple[Level, ...]]] = {
    "collapsed": ("collapse", ("bad",)),
    "unbalanced": ("balance", ("bad",)),
    "unspecialised": ("specialised", ("warn", "bad")),
    "without-effect": ("causal", ("warn", "bad")),
}


def verdict(document: Mapping[str, Any]) -> list[Statement]:
    """The statements that hold for a document, those without data as ``unknown``."""
    routing, ablation = document.get("routing"), document.get("ablation")
    return [_balance(routing), _collapse(routing), _specialised(routing), _causal(ablation, document)]


def fails(document: Mapping[str, Any], condition: str) -> bool:
    """Whether a document meets one of :data:`FAILURES`.

    Raises:
        ConfigError: an unknown condition, or one that the document says nothing about.
    """
    if condition not in FAILURES:
        raise ConfigError(f"--fail-if: got {condition!r}, expected one of {', '.join(FAILURES)}")
    key, levels = FAILURES[condition]
    found = next(s for s in verdict(document) if s.key == key)
    if found.level == "unknown":
        raise ConfigError(f"--fail-if {condition}: {document.get('name')}: cannot be told: {found.text}")
    return found.level in levels


def _values(routing: Mapping[str, Any], key: str) -> list[float]:
    return [v for v in routing[key] if v is not None]


def _balance(routing: Mapping[str, Any] | None) -> Statement:
    if routing is None:
        return Statement("balance", "unknown", "Balance unknown", "No routing was recorded.")
    violation = statistics.mean(_values(routing, "max_violation"))
    experts = sum(s["experts"] for s in routing["sites"])
    idle = sum(len(d) for d in routing["dead"] if d is not None)
    text = (
        f"A layer's busiest expert gets {violation + 1:.1f} times its even share (mean MaxVio {violation:.2f}; 0 is "
        f"even); {idle} of {experts} experts get less than a tenth of theirs."
    )
    if violation > VERY_UNEVEN or idle > IDLE[1] * experts:
        return Statement("balance", "bad", "Not balanced", text)
    if violation > UNEVEN or idle > IDLE[0] * experts:
        return Statement("balance", "warn", "Unevenly used", text)
    return Statement("balance", "good", "Balanced", text)


def collapsed_sites(routing: Mapping[str, Any]) -> list[int]:
    """Sites that send nearly every token to the same K experts: ``(exp(H(load)) - K) / (E - K)`` below a tenth.

    K is 1 where every expert is used, with a weight of its own.
    """
    out = []
    for i, site in enumerate(routing["sites"]):
        K, E, used = site["choices"], site["experts"], routing["effective_experts"][i]
        K = 1 if K >= E else K
        if used is not None and (used - K) / (E - K) < COLLAPSED:
            out.append(i)
    return out


def _collapse(routing: Mapping[str, Any] | None) -> Statement:
    if routing is None:
        return Statement("collapse", "unknown", "Collapse unknown", "No routing was recorded.")
    sites, found = len(routing["sites"]), len(collapsed_sites(routing))
    used, decided = _values(routing, "effective_experts"), statistics.mean(_values(routing, "mean_entropy"))
    most, choice = statistics.mean(s["experts"] for s in routing["sites"]), "un" if decided > UNDECIDED else ""
    text = (
        f"{found} of {sites} routers send nearly all tokens to the same experts; {statistics.mean(used):.1f} of "
        f"{most:.1f} experts are in effective use. A token's own choice is {choice}decided: mean entropy {decided:.2f} "
        "of 1."
    )
    if found * 2 >= sites:
        return Statement("collapse", "bad", "Collapsed", text)
    if found:
        return Statement("collapse", "warn", "Partly collapsed", text)
    undecided = decided > UNDECIDED
    return Statement("collapse", "warn" if undecided else "good", "Undecided" if undecided else "Not collapsed", text)


def _specialised(routing: Mapping[str, Any] | None) -> Statement:
    key = "specialised"
    if routing is None:
        return Statement(key, "unknown", "Specialisation unknown", "No routing was recorded.")
    found = routing["specialisation"]
    if found is None:
        text = "Everything is of one domain; give at least two with --domain."
        return Statement(key, "unknown", "Specialisation unknown", text)
    low, high = found["interval"]
    figures = (
        f"expert and domain share {found['nmi']:.3f} of their information (95 % interval {low:.3f} to {high:.3f}); "
        f"with the labels of the documents shuffled it is {found['chance']:.3f} (p = {found['p_value']:.2g}, "
        f"{found['permutations']} shuffles)"
    )
    if found["p_value"] > SIGNIFICANT or low <= 0 or found["above_chance"] <= 0:
        return Statement(
            key, "warn", "Not specialised", f"The choice of experts does not tell domains apart: {figures}."
        )
    strength = next(word for bound, word in STRENGTH if found["above_chance"] < bound)
    title = f"{strength.capitalize()} specialised"
    return Statement(key, "good", title, f"The choice of experts depends on the domain: {figures}.")


def _causal(ablation: Mapping[str, Any] | None, document: Mapping[str, Any]) -> Statement:
    if ablation is None:
        text = "No ablation was run; the command molora eval ablate asks whether routing matters to the loss."
        return Statement("causal", "unknown", "Effect unknown", text)
    named = {i["name"]: i for i in ablation["interventions"]}
    shuffled = named.get("shuffled")
    if shuffled is None:
        return Statement("causal", "unknown", "Effect unknown", "The ablation holds no shuffled gates.")
    delta = shuffled["delta"]
    hurt = [d for d, v in delta.items() if v["low"] > 0]
    mean = statistics.mean(v["value"] for v in delta.values())
    text = (
        f"With the gates of all tokens shuffled, the loss rises by {mean:.3f} nats on average, beyond doubt in "
        f"{len(hurt)} of {len(delta)} domains."
    )
    text += "".join(" " + line for line in _purposes(ablation["interventions"], document.get("expert_names")))
    if hurt:
        return Statement("causal", "good", "Routing matters", text)
    return Statement("causal", "warn", "Routing does not matter", f"{text} Any gates would do as well.")


def _purposes(interventions: Sequence[Mapping[str, Any]], names: Sequence[str] | None) -> list[str]:
    own = [i for i in interventions if i["kind"] == "favourites"]
    out = []
    if own:
        right = sum(i["worst"] == i["domain"] for i in own)
        out.append(f"Without a domain's favourite experts that domain suffers most in {right} of {len(own)} cases.")
    by_name = [i for i in interventions if i["kind"] == "expert" and i["site"] is None and names is not None]
    same = [i for i in by_name if names is not None and names[i["expert"]] in i["delta"]]
    if same:
        right = sum(i["worst"] == (names or [])[i["expert"]] for i in same)
        out.append(f"{right} of {len(same)} experts are named for the domain that suffers most without them.")
    return out
