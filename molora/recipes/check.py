"""What a config cannot check of itself, because it depends on entries of tables: one function, all faults at once."""

from __future__ import annotations

from collections.abc import Mapping

from molora.config import MoloraConfig, Placement
from molora.config.strict import report, shown, well_typed
from molora.errors import nearest
from molora.initialisers import INITIALISERS, initialiser, start_of
from molora.kernels.dispatch import FORMER_NAMES, KERNELS
from molora.layers.banks import BANKS, config_faults
from molora.penalties import PENALTIES
from molora.routers import BALANCES, GATES, ROUTERS

__all__ = ["check", "entry_faults"]


def check(config: MoloraConfig, title: str = "MoloraConfig") -> None:
    """See that entries of tables stand for every name in ``config``, and that they go together.

    Raises:
        ConfigError: with every fault; within :func:`molora.config.strict.all_faults` they are kept for its end.
    """
    if well_typed(config):
        report(title, entry_faults(config))


def entry_faults(config: MoloraConfig) -> list[str]:
    """Every rule of the entries that a config breaks, in words; an empty list when all is well."""
    out = unknown_names(config)
    if out:
        return out
    for p in config.placements:
        out += _start_faults(p) + _router_faults(p) + _gate_faults(p) + _balance_faults(p)
    return out + _shared_faults(config)


def unknown_names(config: MoloraConfig) -> list[str]:
    """The names that are in no table."""
    out = _unknown("kernel", config.kernel, {"auto": None, **KERNELS}, FORMER_NAMES) + config_faults(config)
    for p in config.placements:
        out += _unknown("router", p.router.kind, ROUTERS) + _unknown("gate", p.gate.kind, GATES)
        out += [fault for b in p.balance for fault in _unknown("balance rule", b.kind, BALANCES)]
        out += [fault for rule in p.penalties for fault in _unknown("penalty", rule.kind, PENALTIES)]
        if initialiser(p.init_lora_weights) is None:
            starts = [name for name, entry in INITIALISERS.items() if not entry.instead]
            known = ", ".join(map(repr, starts)) + nearest(p.init_lora_weights, starts)
            out.append(f"init_lora_weights: got {shown(p.init_lora_weights)}, expected one of {known}")
    return out


def _unknown(what: str, name: str, table: Mapping[str, object], former: Mapping[str, str] | None = None) -> list[str]:
    if name in table or name in (former or {}):
        return []
    return [f"{what}: got {shown(name)}, expected one of {', '.join(table)}{nearest(name, table)}"]


def _start_faults(p: Placement) -> list[str]:
    out, start, given = [], start_of(p), f"init_lora_weights={p.init_lora_weights!r}"
    if start.instead:
        out.append(f"init_lora_weights: got {p.init_lora_weights!r}, but {start.instead}")
    if p.imported and start.needs_linear:
        out.append(f"init_lora_weights: got {p.init_lora_weights!r} for experts that are ready-made, expected True")
    if "lora_A" not in BANKS[p.bank].dims and p.init_lora_weights != Placement.init_lora_weights:
        out.append(f"{given}: got bank={p.bank!r}, which has a start of its own, expected the default")
    ranks = p.r if isinstance(p.r, tuple) else (p.r,)
    if start.in_halves and (p.rank_one or any(r % 2 for r in ranks)):
        got = "experts of one rank" if p.rank_one else f"r={shown(p.r)}"
        out.append(f"{given}: got {got}, expected even ranks")
    return out


def _router_faults(p: Placement) -> list[str]:
    out, router, options = [], ROUTERS[p.router.kind], p.router
    if not isinstance(options, router.options):
        out.append(
            f"router: got options {type(options).__name__} for kind={shown(options.kind)}, expected "
            f"{router.options.__name__}"
        )
    if options.scope not in router.sits:
        wide = ", ".join(repr(name) for name, entry in ROUTERS.items() if "model" in entry.sits)
        got = f"kind={shown(options.kind)} with scope={options.scope!r}"
        out.append(f"router: got {got}: {wide} and 'model' go together")
    if p.unit == "ffn" and not router.chooses:
        out.append("unit='ffn': needs select='ffn' and a router that chooses and sees the whole input")
    return out


def _gate_faults(p: Placement) -> list[str]:
    out, router, gate = [], ROUTERS[p.router.kind], GATES[p.gate.kind]
    if not isinstance(p.gate, gate.options):
        out.append(
            f"gate: got options {type(p.gate).__name__} for kind={shown(p.gate.kind)}, expected {gate.options.__name__}"
        )
        return out
    if p.gate.top_k is not None and gate.choice_of(p.gate) != "fixed":
        out.append(f"top_k: got {shown(p.gate.top_k)} for a gate of kind {p.gate.kind!r}, which does not choose by it")
    if gate.extras and not router.gives_extras:
        out.append(
            f"gate: kind={shown(p.gate.kind)} takes {gate.extras} more numbers a token, which a router of kind "
            f"{shown(p.router.kind)} does not give; expected another router"
        )
    if p.router.scope == "model" and gate.couples_tokens(p.gate):
        out.append(
            "a router of scope 'model': needs one num_experts and one top_k for all layers, and no rank_one, "
            "capacity, jitter or partition"
        )
    experts = p.r if p.rank_one else p.num_experts
    several = max((experts if isinstance(experts, tuple) else (experts,)) or (1,)) > 1 or p.imported
    taught = any(b.coef > 0 and BALANCES[b.kind].teaches for b in p.balance)
    if p.gate.constant_weight() and router.chooses and p.router.train and several and not taught:
        out.append(
            "top_k=1: the chosen expert's weight is the constant 1, so the task loss gives the router no gradient;"
            " use a balance or gate loss above 0, hard_weight='prob' or 'ste', or a larger top_k"
        )
    return out


def _balance_faults(p: Placement) -> list[str]:
    out, router = [], ROUTERS[p.router.kind]
    if p.balance and not router.chooses:
        out.append("balance: got a rule for a router that chooses nothing, expected none")
    for b in p.balance:
        rule = BALANCES[b.kind]
        if not isinstance(b, rule.options):
            out.append(
                f"balance: got options {type(b).__name__} for kind={shown(b.kind)}, expected {rule.options.__name__}"
            )
    learned = BANKS[p.bank].dims if p.train_experts else {}
    for own in p.penalties:
        wanted = PENALTIES[own.kind].options
        still = [name for name in PENALTIES[own.kind].parameters if name not in learned]
        if still:
            out.append(f"penalties: {own.kind!r} is on {', '.join(still)}, expected experts that have it and train it")
        if not isinstance(own, wanted):
            out.append(
                f"penalties: got options {type(own).__name__} for kind={shown(own.kind)}, expected {wanted.__name__}"
            )
    steering = [b.kind for b in p.balance if BALANCES[b.kind].steers]
    chosen = GATES[p.gate.kind].choice_of(p.gate) == "fixed"
    if len(steering) > 1 or (steering and not (chosen and router.steerable and p.router.scope != "model")):
        out.append(
            f"balance: a {steering[0]!r} rule steers a choice: expected one at most, with a top_k and a router per "
            "module"
        )
    return out


def _shared_faults(config: MoloraConfig) -> list[str]:
    """What the placements and the options that they share say against each other."""
    out = []
    special = [p for p in config.placements if start_of(p).needs_linear]
    odd = [f"{name}={r}" for name, r in config.rank_pattern if r % 2]
    if odd and any(start_of(p).in_halves for p in special):
        out.append(
            f"rank_pattern: got {odd[0]} with init_lora_weights={special[0].init_lora_weights!r}, expected even ranks"
        )
    if config.init_from and special:
        out.append(
            f"init_from: got init_lora_weights={special[0].init_lora_weights!r} too, expected one of the two starts"
        )
    if not config.target_parameters:
        return out
    what = "target_parameters"
    always = [p for p in config.placements if not ROUTERS[p.router.kind].chooses and p.num_experts == 1]
    if len(always) != 1 or len(config.placements) != 1 or len(config.adapters) > 1:
        out.append(
            f"{what}: got recipe {config.recipe!r}, expected 'lora': the base's experts run as one function of their "
            "weights, which are the same for all tokens of a forward, and a mixture's depend on the token"
        )
    for p in special:
        got = f"init_lora_weights={p.init_lora_weights!r}"
        out.append(f"{what}: got {got}, expected True, 'gaussian' or False: that start is for linears")
    return out
