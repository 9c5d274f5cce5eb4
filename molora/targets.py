"""From a config and a model to resolved sites: which linears, in which unit, with which experts, ranks and scales."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from molora.config import MoloraConfig, PerLayer, Placement, SiteConfig, per_layer
from molora.errors import AdapterError, ConfigError, TargetError, nearest
from molora.interop.peft_lora import LoraAdapter
from molora.structure import FFNBlock, Trace, ffn_blocks, linear_shape, trace

T = TypeVar("T")

__all__ = ["Candidate", "candidates", "layer_of", "resolve"]


@dataclass(frozen=True)
class Candidate:
    """A linear of the base: its path, widths, layer index (-1 without) and the path of its stack of layers."""

    path: str
    shape: tuple[int, int]
    layer: int
    stack: str


def layer_of(path: str) -> tuple[int, str]:
    """(index, stack) from the first integer in a module path; (-1, "") without one."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return int(part), ".".join(parts[:i])
    return -1, ""


def candidates(model: nn.Module) -> dict[str, Candidate]:
    """Every linear of ``model`` by path, in module order; one that is shared appears under its first path."""
    found = {}
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape is not None and path:
            found[path] = Candidate(path, shape, *layer_of(path))
    return found


def _parent(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _chooses_experts(model: nn.Module, c: Candidate) -> bool:
    """Whether a linear is the router of a mixture in the base itself: as many outputs as its siblings have experts."""
    for child in _parent(model, c.path).children():
        stacked = (p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3)
        if c.shape[1] in {*stacked, *((len(child),) if isinstance(child, nn.ModuleList) else ())}:
            return True
    return False


def _language_stacks(model: nn.Module, stacks: list[str]) -> set[str]:
    """The stacks of layers that belong to the token embedding: all of an encoder-decoder, not a vision tower."""
    if len(stacks) <= 1 or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return set(stacks)
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return set(stacks)
    paths = [p.split(".") for p, m in model.named_modules() if m is embedding]
    if not paths:
        return set(stacks)

    def shared(stack: str) -> int:
        return next((i for i, (a, b) in enumerate(zip(stack.split("."), paths[0], strict=False)) if a != b), 99)

    best = max(shared(s) for s in stacks)
    return {s for s in stacks if shared(s) == best}


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def _refuse(model: nn.Module, path: str) -> None:
    """TargetError for a module that was named but cannot be adapted."""
    module = model.get_submodule(path)
    kind = type(module).__name__
    if isinstance(_parent(model, path), nn.MultiheadAttention):
        raise TargetError(
            f"{path}: {kind} inside nn.MultiheadAttention, which reads its weight and never calls it; leave it out"
        )
    if linear_shape(module) is None:
        raise TargetError(
            f"{path}: got a {kind}, expected a linear (something that maps the last dimension, with in_features and "
            "out_features); embeddings, convolutions and norms can be trained whole with modules_to_save"
        )
    weight = getattr(module, "weight", None)
    tied = [
        p for p, m in model.named_modules() if isinstance(m, nn.Embedding) and m.weight is weight and weight is not None
    ]
    if tied:
        raise TargetError(
            f"{path}: its weight is tied to the embedding {tied[0]}; an adapter on one would part them. Leave it out"
        )


def _targets(model: nn.Module, config: MoloraConfig, found: Mapping[str, Candidate]) -> list[str]:
    """Paths of the targeted linears, in module order."""
    wanted = config.target_modules
    if wanted == "all-linear":
        stacks = _language_stacks(model, list(dict.fromkeys(c.stack for c in found.values() if c.layer >= 0)))
        picked = [
            c.path
            for c in found.values()
            if c.stack in stacks
            and c.layer >= 0
            and not _chooses_experts(model, c)
            and not isinstance(_parent(model, c.path), nn.MultiheadAttention)
        ]
    else:
        picked = _named(model, wanted, found)
    picked = [p for p in picked if not any(_ends_with(p, e) for e in config.exclude_modules)]
    layers = {c.layer for c in found.values()}
    unknown = [i for i in config.layers_to_transform if i not in layers]
    if unknown:
        raise ConfigError(f"layers_to_transform: got {unknown}, expected indices from 0 to {max(layers)}")
    if config.layers_to_transform:
        picked = [p for p in picked if found[p].layer in config.layers_to_transform]
    if not picked:
        raise TargetError(
            f"target_modules={wanted!r} with exclude_modules={config.exclude_modules!r} matches no linear; there are: "
            f"{', '.join(_endings(found)) or 'none at all'}"
        )
    return picked


def _endings(found: Mapping[str, Candidate]) -> list[str]:
    return list(dict.fromkeys(p.rpartition(".")[2] for p in found))


def _named(model: nn.Module, wanted: str | tuple[str, ...], found: Mapping[str, Candidate]) -> list[str]:
    paths = [p for p, _ in model.named_modules() if p]
    if isinstance(wanted, str):
        try:
            matched = {p for p in paths if re.fullmatch(wanted, p)}
        except re.error as e:
            raise ConfigError(f"target_modules: got {wanted!r}, which is not a regular expression ({e})") from e
        return [p for p in found if p in matched]
    matched = set()
    for name in wanted:
        hits = [p for p in paths if _ends_with(p, name)]
        if not hits:
            raise TargetError(
                f"target_modules: no module is named {name!r}{nearest(name, _endings(found))} "
                f"The model's linears are named: {', '.join(_endings(found))}"
            )
        for p in hits:
            _refuse(model, p)
        matched.update(hits)
    return [p for p in found if p in matched]


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
        }
        return SiteConfig(path=path, placement=placement, **{**values, **own})  # type: ignore[arg-type]

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
        if not blocks:
            raise TargetError(
                f"recipe {self.config.recipe!r} needs a feed-forward block, and none of the targeted modules is in one "
                f"(up-side linears, an elementwise middle, a down linear): {', '.join(sorted(_last(targets)))}"
            )
        return blocks

    def resolve(self, targets: list[str]) -> list[SiteConfig]:
        blocks = self.blocks(set(targets))
        members = {path for b in blocks for path in (*b.ups, b.down)}
        for i, p in enumerate(self.config.placements):
            if p.select == "ffn":
                for b in blocks:
                    self.sites += self.block(b, i, p, set(targets))
            else:
                rest = [t for t in targets if p.select == "all" or t not in members]
                self.sites += [self.site(t, i) for t in rest]
        order = {path: n for n, (path, _) in enumerate(self.model.named_modules())}
        self.sites.sort(key=lambda s: order[s.path])
        return [s.replace(index=n) for n, s in enumerate(self.sites)]

    def block(self, b: FFNBlock, i: int, p: Placement, targets: set[str]) -> list[SiteConfig]:
        """The sites of one feed-forward block under a router of its own."""
        paths, name = [*b.ups, b.down], _common(b)
        roles = {u: "up" for u in b.ups} | {b.down: "down"} if p.unit == "ffn" else dict.fromkeys(paths, "linear")
        if p.unit == "ffn" and not b.slots:
            return self.rows(b, i, targets, name)
        keep = [u for u in paths if p.unit == "ffn" or u in targets or u == b.ups[0]]
        return [self.site(u, i, adapted=u in targets, role=roles[u], block=b.down, lead=u == b.ups[0]) for u in keep]

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


def _last(paths: set[str]) -> set[str]:
    return {p.rpartition(".")[2] for p in paths}


def _common(b: FFNBlock) -> str:
    parts = [p.split(".") for p in (*b.ups, b.down)]
    length = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return ".".join(parts[0][:length])


def _pattern(patterns: tuple[tuple[str, T], ...], path: str, default: T) -> T:
    return next((v for name, v in patterns if _ends_with(path, name)), default)


def _encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def resolve(model: nn.Module, config: MoloraConfig, adapters: Mapping[str, LoraAdapter]) -> tuple[SiteConfig, ...]:
    """All sites of ``config`` on ``model``; nothing is changed. ``adapters``: by name, with paths of this model.

    Raises:
        TargetError, ConfigError, AdapterError: for anything that cannot work, before anything is built.
    """
    found = candidates(model)
    modules = {name: a.modules for name, a in adapters.items()}
    if any(p.router.scope == "model" for p in config.placements) and _encoder_decoder(model):
        raise TargetError(
            f"recipe {config.recipe!r} on {type(model).__name__}: a model-wide router needs one stream of tokens, an "
            "encoder-decoder has two; use a recipe with a router per module"
        )
    targets = _imported(model, config, modules, found) if modules else _targets(model, config, found)
    record, why = _try_trace(model)
    return tuple(_Resolver(model, config, found, modules, record, why).resolve(targets))


def _try_trace(model: nn.Module) -> tuple[Trace | None, str]:
    """The shape-only forward, or why it failed. A model may raise anything when it is run without values."""
    try:
        return trace(model), ""
    except Exception as e:  # noqa: BLE001 the model's own code runs here
        return None, f"{type(e).__name__}: {e}"


def _imported(
    model: nn.Module,
    config: MoloraConfig,
    modules: Mapping[str, Mapping[str, tuple[object, object, float]]],
    found: Mapping[str, Candidate],
) -> list[str]:
    """Union of the adapters' modules, cut to ``target_modules`` where that was given."""
    union = {path for m in modules.values() for path in m}
    for path in sorted(union):
        _refuse(model, path)
    if len(modules) > 1 and not any(sum(path in m for m in modules.values()) > 1 for path in union):
        raise AdapterError(f"adapters {list(modules)}: no module is adapted by two of them, so there is nothing to mix")
    if config.target_modules != "all-linear":
        union &= set(_targets(model, config, found))
    return [p for p in found if p in union and not any(_ends_with(p, e) for e in config.exclude_modules)]
