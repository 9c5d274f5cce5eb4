"""From a config, a model and its targeted linears to resolved sites: units, experts, ranks and scales."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor, nn

from molora.adapter.peft_lora import LoraAdapter
from molora.config import MoloraConfig, Placement, per_layer
from molora.config.banks import SiteBank
from molora.config.site import SiteConfig
from molora.config.strict import PerLayer
from molora.errors import ConfigError, TargetError, nearest
from molora.initialisers import start_of
from molora.surgery.blocks import FFNBlock, ffn_blocks
from molora.surgery.target_parameters import Stacked, targeted_parameters
from molora.surgery.targets import FUSED, Candidate, candidates, ends_with, fused_experts, imported, targeted
from molora.surgery.trace import Trace, trace

__all__ = ["resolve"]

T = TypeVar("T")


@dataclass
class _Resolver:
    """Builds the sites of one model; split by concern so that each rule stands once."""

    model: nn.Module
    config: MoloraConfig
    found: dict[str, Candidate]
    adapters: Mapping[str, Mapping[str, tuple[object, object, float]]]
    record: Trace | None
    why_no_trace: str
    sites: list[SiteConfig] = field(default_factory=list)

    def layers(self, c: Candidate) -> int:
        return 1 + max((o.layer for o in self.found.values() if o.stack == c.stack), default=0)

    def value(self, name: str, v: PerLayer, c: Candidate, sampled: bool) -> int:
        layers = self.layers(c)
        if isinstance(v, tuple) and len(v) > layers and c.layer >= 0 and not sampled:
            raise ConfigError(
                f"{name}: got {len(v)} values {v} for the {layers} layers of {c.stack!r}, expected at most {layers}"
            )
        return per_layer(v, None if c.layer < 0 else c.layer, layers)

    def site(self, path: str, placement: int, *, adapted: bool = True, **own: object) -> SiteConfig:
        p, c = self.config.placements[placement], self.found[path]
        experts, ranks, scales, top_k = self.size(p, c)
        masks = {} if self.record is None else self.record.masks(_encoder_decoder(self.model))
        values: dict[str, object] = {
            "layer": c.layer,
            "mask": masks.get(path, "attention_mask"),
            "in_features": c.shape[0],
            "out_features": c.shape[1],
            "num_experts": experts,
            "ranks": ranks if adapted else (),
            "scales": scales if adapted else (),
            "top_k": top_k,
            "takes_back": adapted and start_of(p).takes_back,
            "bank": p.bank if adapted else "plain",
            "banks": _always_on(p) if adapted else (),
        }
        site = SiteConfig(path=path, placement=placement, **{**values, **own})  # type: ignore[arg-type]
        return site.of_kind(site.kind)

    def size(self, p: Placement, c: Candidate) -> tuple[int, tuple[int, ...], tuple[float, ...], int | None]:
        """(experts, ranks, scales, top_k) of one linear."""
        top_k = None if p.gate.top_k is None else self.value("top_k", p.gate.top_k, c, p.sampled)
        if p.imported:
            parts = [m.get(c.path) for m in self.adapters.values()]
            ranks = tuple(0 if part is None else int(part[0].shape[0]) for part in parts)  # type: ignore[attr-defined]
            scales = tuple(0.0 if part is None else part[2] * p.global_scale for part in parts)
            return len(parts), ranks, scales, top_k
        r = _pattern(self.config.rank_pattern, c.path, self.value("r", p.r, c, p.sampled))
        experts = r if p.rank_one else self.value("num_experts", p.num_experts, c, p.sampled)
        if top_k is not None and top_k > experts:
            raise ConfigError(
                f"{c.path}: top_k: got {top_k} with {experts} experts on layer {c.layer}, expected at most {experts}"
            )
        if experts % p.gate.partition:
            raise ConfigError(
                f"{c.path}: got {experts} experts, expected a multiple of {p.gate.partition} (ranks that share a logit)"
            )
        alpha = _pattern(self.config.alpha_pattern, c.path, p.lora_alpha)
        divisor = {"r": r, "sqrt_r": math.sqrt(r), "top_k": top_k or 1}[p.scale_by]
        return experts, (1 if p.rank_one else r,), (alpha / divisor * p.global_scale,), top_k

    def blocks(self, targets: set[str]) -> list[FFNBlock]:
        if all(p.select == "all" and p.router.scope != "block" for p in self.config.placements):
            return []
        if self.record is None:
            raise TargetError(
                f"recipe {self.config.recipe!r} needs the model's feed-forward blocks, but it cannot be run without "
                f"values to find them: {self.why_no_trace}; use a recipe that works linear by linear"
            )
        blocks = [b for b in ffn_blocks(self.record) if targets & {*b.ups, b.down}]
        if any(b.act for b in blocks):
            blocks = self.same_in_training(blocks)
        if not blocks:
            raise TargetError(
                f"recipe {self.config.recipe!r} needs a feed-forward block, and none of the targeted modules is in one "
                f"(up-side linears, an elementwise middle, a down linear): {', '.join(sorted(_last(targets)))}"
                + (f"; {FUSED}" if fused_experts(self.model) else "")
            )
        return blocks

    def same_in_training(self, blocks: list[FFNBlock]) -> list[FFNBlock]:
        """The blocks, units only where the middle computes the same in train mode (dropout there would be lost)."""
        again, _ = _try_trace(self.model, train=True)
        alike = set() if again is None else set(ffn_blocks(again))
        return [b if b in alike else dataclasses.replace(b, act="", gated="") for b in blocks]

    def resolve(
        self, targets: list[str], stacks: list[Stacked], fused: Mapping[str, tuple[Tensor, Tensor, float]]
    ) -> list[SiteConfig]:
        blocks = self.blocks(set(targets))
        members = {path for b in blocks for path in (*b.ups, b.down)}
        for i, p in enumerate(self.config.placements):
            if p.router.scope == "block":
                for b in blocks:
                    self.sites += self.block(b, i, p, set(targets))
            else:
                own = [t for t in targets if p.select == "all" or (t in members) == (p.select == "ffn")]
                self.sites += [self.site(t, i) for t in own]
        self.sites += [self.stack(s, fused.get(s.path)) for s in stacks]
        order: dict[str, int] = {}
        for path, module in self.model.named_modules():
            order |= {p: len(order) + i for i, p in enumerate((path, *(f"{path}.{n}" for n in module._parameters)))}
        self.sites.sort(key=lambda s: order[s.path])
        return [s.replace(index=n) for n, s in enumerate(self.sites)]

    def stack(self, s: Stacked, ready: tuple[Tensor, Tensor, float] | None) -> SiteConfig:
        """The site of stacked experts of the base; ``ready``: their LoRAs side by side, where they are ready-made."""
        if ready is None:
            _, (rank, *_), (scale, *_), _ = self.size(self.config.placements[0], s)
        else:
            rank, scale = ready[0].shape[0] // s.experts, ready[2]
        return SiteConfig(
            path=s.path,
            placement=0,
            role="parameter",
            transposed=s.transposed,
            layer=s.layer,
            in_features=s.shape[0],
            out_features=s.shape[1],
            num_experts=s.experts,
            ranks=(rank,),
            scales=(scale,),
            bank=self.config.placements[0].bank,
        )

    def block(self, b: FFNBlock, i: int, p: Placement, targets: set[str]) -> list[SiteConfig]:
        """The sites of one feed-forward block under a router of its own."""
        paths, name = [*b.ups, b.down], _common(b)
        roles = {u: "up" for u in b.ups} | {b.down: "down"} if p.unit == "ffn" else dict.fromkeys(paths, "linear")
        if p.unit == "ffn" and not b.slots:
            return self.rows(b, i, targets, name)
        keep = [u for u in paths if p.unit == "ffn" or u in targets or u == b.ups[0]]
        act = b.act if p.unit == "ffn" else ""
        sites = [
            self.site(
                *(u, i),
                adapted=u in targets,
                role=roles[u],
                block=b.down,
                lead=u == b.ups[0],
                act=act,
                gated=bool(act) and u == b.gated,
            )
            for u in keep
        ]
        ranks = {s.expert_ranks() for s in sites if s.ranks}
        if len(ranks) > 1 or not sites[0].ranks:  # one map of ranks, the leading site's, serves the linears of a unit
            return [s.replace(act="", gated=False) for s in sites]
        return sites

    def rows(self, b: FFNBlock, i: int, targets: set[str], name: str) -> list[SiteConfig]:
        paths = {*b.ups, b.down}
        inside = {p for p in self.found if p.startswith(name + ".")}
        if inside != paths:
            raise TargetError(
                f"{b.down}: the feed-forward block's middle cannot carry a slot axis, and the block is no module of "
                "its own that could be run once per chosen expert; use a recipe that works linear by linear"
            )
        lead = self.site(b.ups[0], i, adapted=False, role="rows", block=b.down).replace(path=name)
        return [lead, *(self.site(p, i, block=b.down, lead=False) for p in (*b.ups, b.down) if p in targets)]


def _always_on(p: Placement) -> tuple[SiteBank, ...]:
    return tuple(SiteBank(name=a.name, r=a.r, scale=a.lora_alpha / a.r, bank=a.bank) for a in p.always)


def _last(paths: set[str]) -> set[str]:
    return {p.rpartition(".")[2] for p in paths}


def _common(b: FFNBlock) -> str:
    parts = [p.split(".") for p in (*b.ups, b.down)]
    length = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return ".".join(parts[0][:length])


def _pattern(patterns: tuple[tuple[str, T], ...], path: str, default: T) -> T:
    return next((v for name, v in patterns if ends_with(path, name)), default)


def _encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def resolve(model: nn.Module, config: MoloraConfig, adapters: Mapping[str, LoraAdapter]) -> tuple[SiteConfig, ...]:
    """All sites of ``config`` on ``model``; nothing is changed. ``adapters``: by name, with paths of this model.

    Raises:
        TargetError, ConfigError, AdapterError: for anything that cannot work, before anything is built.
    """
    found = candidates(model)
    modules = {name: a.modules for name, a in adapters.items()}
    record, why = _try_trace(model)
    read = set() if record is None else record.read()
    stacks = targeted_parameters(model, config, record)
    fused = {path: m for a in adapters.values() for path, m in a.fused.items()}
    if stacks and not (config.target_modules and (not modules or any(modules.values()))):
        targets = []  # the base's own experts alone
    elif modules:
        targets = imported(model, config, modules, found, read)
    else:
        targets = targeted(model, config, found, read=read)
    masks = {} if record is None else record.masks(_encoder_decoder(model))
    if any(p.router.scope == "model" for p in config.placements) and (
        _encoder_decoder(model) or len({masks[t] for t in targets if t in masks}) > 1
    ):
        raise TargetError(
            f"recipe {config.recipe!r} on {type(model).__name__}: a model-wide router needs one stream of tokens, and "
            "there are two (encoder and decoder, or text and image); use a recipe with a router per module"
        )
    for option, pairs in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for name, _ in pairs:
            adapted = {*targets, *(s.path for s in stacks)}
            if not any(ends_with(t, name) for t in adapted):
                ends = sorted(_last(adapted))
                raise TargetError(
                    f"{option}: no adapted linear is named {name!r}{nearest(name, ends)} There are: {', '.join(ends)}"
                )
    return tuple(_Resolver(model, config, found, modules, record, why).resolve(targets, stacks, fused))


def _try_trace(model: nn.Module, train: bool = False) -> tuple[Trace | None, str]:
    """The shape-only forward, or why it failed. A model may raise anything when it is run without values."""
    try:
        return trace(model, train), ""
    except Exception as e:  # noqa: BLE001 the model's own code runs here
        return None, f"{type(e).__name__}: {e}"
