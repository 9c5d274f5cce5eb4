"""What a converted model is made of: sites, parameters by kind, widths. Reads shapes and dtypes only, never values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from molora.config.site import SiteConfig
from molora.layers.banks import bank_class, banks_of, banks_on, words_of
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import HEAD
from molora.layers.routed import RoutedModule
from molora.layers.saved import SavedModule
from molora.surgery.install import sites_of
from molora.surgery.targets import layer_of
from molora.training.plan.costs import Activations, Weights

__all__ = ["Kind", "SiteGroup", "activation_widths", "dispatched", "kinds_of", "site_groups", "weights_of"]


@dataclass(frozen=True)
class SiteGroup:
    """Sites of one placement and role. ``experts``, ``ranks`` (all experts of a site together) and ``choices``: the
    values that occur, ascending; no choices where every expert is on.
    """

    role: str
    names: tuple[str, ...]
    sites: int
    routers: int
    experts: tuple[int, ...]
    ranks: tuple[int, ...]
    choices: tuple[int, ...]


@dataclass(frozen=True)
class Kind:
    """Parameters of one kind, and the bytes they take as stored."""

    name: str
    parameters: int
    trained: int
    bytes: int


def _adapter_parameters(model: nn.Module) -> dict[int, tuple[str, nn.Parameter]]:
    """Every parameter that the mixture added, with its kind, by id."""
    found: dict[int, tuple[str, nn.Parameter]] = {}

    def add(kind: str, parameters: Iterable[nn.Parameter]) -> None:
        found.update((id(p), (kind, p)) for p in parameters)

    for _, module in sites_of(model).values():
        words = words_of(module.site)
        for place, bank in banks_of(module).items():
            for name, p in bank.named_parameters():
                add(words[f"{place}.{name}"], [p])
        if module.router is not None:
            add("router", module.router.parameters())
    head = getattr(model, HEAD, None)
    if head is not None:
        add("router", head.parameters())
    for saved in model.modules():
        if isinstance(saved, SavedModule):
            add("modules to save", saved.trained.parameters())
    return found


def kinds_of(model: nn.Module) -> tuple[Kind, ...]:
    """Parameters by kind: the frozen base, those of banks in the banks' own words, routers, and modules trained whole;
    kinds without any are left out.
    """
    added = _adapter_parameters(model)
    last = ("router", "modules to save")
    kinds = ("base", *(k for k in dict.fromkeys(k for k, _ in added.values()) if k not in last), *last)
    members: dict[str, list[nn.Parameter]] = {k: [] for k in kinds}
    for p in model.parameters():
        members[added[id(p)][0] if id(p) in added else "base"].append(p)
    return tuple(
        Kind(k, sum(p.numel() for p in ps), sum(p.numel() for p in ps if p.requires_grad), _bytes(ps))
        for k, ps in members.items()
        if ps
    )


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters)


def weights_of(model: nn.Module) -> Weights:
    """The bytes that :func:`molora.training.plan.costs.memory` starts from."""
    added = _adapter_parameters(model)
    trained = [p for _, p in added.values() if p.requires_grad]
    frozen = [p for _, p in added.values() if not p.requires_grad]
    base = [(n, p) for n, p in model.named_parameters() if id(p) not in added]
    parts: dict[object, int] = {}
    for name, p in base:
        index, stack = layer_of(name)
        part = name.rpartition(".")[0] if index < 0 else (stack, index)
        parts[part] = parts.get(part, 0) + _bytes([p])
    return Weights(
        base=sum(parts.values()),
        largest_part=max(parts.values()),
        frozen=_bytes(frozen),
        trained=_bytes(trained),
        frozen_count=sum(p.numel() for p in frozen),
        trained_count=sum(p.numel() for p in trained),
        item=_item(model),
    )


def _item(model: nn.Module) -> int:
    """Bytes of one element of the base; 2 for quantised ones, which compute in half precision."""
    added = _adapter_parameters(model)
    sizes = {p.element_size() for p in model.parameters() if id(p) not in added}
    return 4 if sizes == {4} else 2


def _slots(site: SiteConfig) -> int:
    return site.top_k or site.num_experts


def activation_widths(model: nn.Module) -> Activations:
    """The widths of a converted language model, from its config and its sites."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    sites = [module for _, module in sites_of(model).values()]
    routed = [m for m in sites if m.site.role != "parameter"]
    stacks = [math.prod(m.site.stacked()) for m in sites if m.site.role == "parameter"]
    routers = [m.site for m in routed if m.router is not None and any(p.requires_grad for p in m.router.parameters())]
    repeated = {m.site.block: _slots(m.site) for m in routed if m.site.role == "rows"}
    units = [_slots(m.site) for m in routed if m.site.role in ("up", "down", "rows")]
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads

    def seen(m: RoutedModule) -> int:
        """How often a site sees a token: once a slot behind a slot axis or in a repeated block."""
        return _slots(m.site) if m.site.role == "down" else repeated.get(m.site.block, 1)

    return Activations(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        query=heads * head,
        key_value=(getattr(text, "num_key_value_heads", None) or heads) * head,
        middle=(getattr(text, "intermediate_size", None) or 4 * text.hidden_size) * max(units, default=1),
        vocabulary=text.vocab_size,
        ranks=sum(_ranks(m.site) * seen(m) for m in routed),
        routed=sum(s.in_features for s in routers),
        logits=sum(s.num_experts for s in routers),
        dropped=sum(m.site.in_features * seen(m) for m in routed if m.placement.lora_dropout and m.site.ranks),
        item=_item(model),
        packed=sum(_copied(m) for m in routed),
        stacked=sum(stacks),
        largest_stack=max(stacks, default=0),
    )


def _ranks(site: SiteConfig) -> int:
    """Ranks that a token is multiplied with, of all banks."""
    return sum(sum(bank_class(own).packed_ranks(own)) for own in banks_on(site).values())


def _copied(m: RoutedModule) -> int:
    """Bytes of A and B that a forward makes and keeps: a bank's that packs them, and of several banks side by side."""
    banks = banks_of(m)
    if not banks:
        return 0
    item = next(p.element_size() for bank in banks.values() for p in bank.parameters())
    several = isinstance(m, MixtureLinear) and m.always is not None and m.one_product
    joined = _ranks(m.site) * (m.site.in_features + m.site.out_features) if several else 0
    return item * (joined + sum(bank_class(own).copied(own) for own in banks_on(m.site).values()))


def dispatched(model: nn.Module) -> int:
    """Elements a token would send if experts stood on other GPUs: its choices times a linear's input and output, or
    times the two ends of a block whose experts are whole blocks.
    """
    sites = [module.site for _, module in sites_of(model).values()]
    blocks = {s.block for s in sites if s.role == "rows"}
    total = 0
    for s in sites:
        if s.num_experts == 1 or s.role == "parameter" or (s.block in blocks and s.role != "rows"):
            continue
        ends = {"rows": 2 * s.in_features, "up": s.in_features * s.lead, "down": s.out_features}
        total += _slots(s) * ends.get(s.role, s.in_features + s.out_features)
    return total


def site_groups(model: nn.Module) -> tuple[SiteGroup, ...]:
    """The sites, by placement and role."""
    groups: dict[tuple[int, str], list[RoutedModule]] = {}
    for _, module in sites_of(model).values():
        groups.setdefault((module.site.placement, module.site.role), []).append(module)
    return tuple(
        SiteGroup(
            role=role,
            names=tuple(dict.fromkeys(m.site.path.rpartition(".")[2] for m in members)),
            sites=len(members),
            routers=sum(m.router is not None and not m.always_on for m in members),
            experts=_values(m.site.num_experts for m in members),
            ranks=_values(m.site.total_rank() + sum(b.r for b in m.site.banks) for m in members),
            choices=_values(m.site.top_k for m in members if m.site.top_k is not None),
        )
        for (_, role), members in sorted(groups.items(), key=lambda item: item[0][0])
    )


def _values(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted(set(values)))
