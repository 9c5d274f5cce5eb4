"""Which linears of a model are targeted: by default those of the language stack's repeated layers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass

from torch import nn

from molora.config import MoloraConfig
from molora.errors import AdapterError, ConfigError, TargetError, nearest
from molora.surgery.trace import linear_shape

__all__ = ["FUSED", "Candidate", "candidates", "ends_with", "fused_experts", "imported", "layer_of", "refuse"]
__all__ += ["targeted"]

CONVOLUTIONS = (nn.Conv1d, nn.ConvTranspose1d)  # their weight has three dimensions, as stacked experts have
FUSED = (
    "the base's own experts are fused into parameters of three dimensions, not linears; recipe 'lora' adapts them by "
    "target_parameters, and all recipes its attention, shared experts and dense blocks"
)


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
    """Whether a linear gates a mixture in the base itself: as many outputs as its siblings have experts, or one."""
    if c.shape[1] == 1:
        return True
    for child in _parent(model, c.path).children():
        if isinstance(child, CONVOLUTIONS):
            continue
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


def ends_with(path: str, name: str) -> bool:
    """Whether ``name`` is the path or its last whole components."""
    return path == name or path.endswith("." + name)


def fused_experts(model: nn.Module) -> list[str]:
    """Names of the parameters that hold the base's own experts, stacked in three dimensions."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if not isinstance(module, CONVOLUTIONS)
        for name, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and p.shape[0] > 1
    ]


def refuse(model: nn.Module, path: str, read: Set[str]) -> None:
    """TargetError for a module that was named but cannot be adapted; ``read`` as for :func:`targeted`."""
    module = model.get_submodule(path)
    kind = type(module).__name__
    if path in read:
        raise TargetError(
            f"{path}: the model reads this {kind}'s weight and never calls it, so that experts on it would do nothing; "
            "leave it out"
        )
    if isinstance(_parent(model, path), nn.MultiheadAttention):
        raise TargetError(
            f"{path}: {kind} inside nn.MultiheadAttention, which reads its weight and never calls it; leave it out"
        )
    if linear_shape(module) is None and fused_experts(module):
        raise TargetError(f"{path}: got a {kind}; {FUSED}")
    if linear_shape(module) is None:
        raise TargetError(
            f"{path}: got a {kind}, expected a linear (something that maps the last dimension, with in_features and "
            "out_features); embeddings, convolutions and norms can be trained whole with modules_to_save"
        )
    weight = module._parameters.get("weight")
    tied = [
        p for p, m in model.named_modules() if isinstance(m, nn.Embedding) and m.weight is weight and weight is not None
    ]
    if tied:
        raise TargetError(
            f"{path}: its weight is tied to the embedding {tied[0]}; an adapter on one would part them. Leave it out"
        )


def targeted(
    model: nn.Module,
    config: MoloraConfig,
    found: Mapping[str, Candidate],
    among: set[str] | None = None,
    read: Set[str] = frozenset(),
) -> list[str]:
    """Paths of the targeted linears, in module order; of those ``among`` only, where that is given.

    ``read``: linears whose weight the model reads without calling them; left out, or refused where they were named.
    """
    wanted = config.target_modules
    if wanted == "all-linear" and among is not None:
        picked = [p for p in found if p in among]
    elif wanted == "all-linear":
        stacks = _language_stacks(model, list(dict.fromkeys(c.stack for c in found.values() if c.layer >= 0)))
        picked = [
            c.path
            for c in found.values()
            if c.stack in stacks
            and c.layer >= 0
            and c.path not in read
            and not _chooses_experts(model, c)
            and not isinstance(_parent(model, c.path), nn.MultiheadAttention)
        ]
    else:
        picked = [p for p in _named(model, wanted, found, read) if among is None or p in among]
    for name in config.exclude_modules:
        _matching(model, "exclude_modules", name, found)
    picked = [p for p in picked if not any(ends_with(p, e) for e in config.exclude_modules)]
    layers = {c.layer for c in found.values()}
    unknown = [i for i in config.layers_to_transform if i not in layers]
    if unknown:
        last = max(layers, default=-1)
        raise ConfigError(f"layers_to_transform: got {unknown}, expected indices from 0 to {last}")
    if config.layers_to_transform:
        picked = [p for p in picked if found[p].layer in config.layers_to_transform]
    lazy = [p for p in picked if not all(found[p].shape)]
    if lazy:
        raise TargetError(
            f"{lazy[0]}: this linear has no widths before its first use; run the model once, then convert"
        )
    if not picked:
        raise TargetError(
            f"target_modules={wanted!r} with exclude_modules={config.exclude_modules!r} matches no linear; there are: "
            f"{', '.join(_endings(found)) or 'none at all'}. A list holds name endings, a string is a regular "
            "expression over whole paths"
        )
    return picked


def _endings(found: Mapping[str, Candidate]) -> list[str]:
    return list(dict.fromkeys(p.rpartition(".")[2] for p in found))


def _matching(model: nn.Module, option: str, name: str, found: Mapping[str, Candidate]) -> list[str]:
    """Paths that end with ``name``; TargetError with near misses when there are none."""
    hits = [p for p, _ in model.named_modules() if p and ends_with(p, name)]
    fused = [] if hits else [p for p in fused_experts(model) if ends_with(p, name)]
    if fused:
        raise TargetError(f"{option}: got {name!r}, which is the parameter {fused[0]}; {FUSED}")
    if not hits:
        raise TargetError(
            f"{option}: no module is named {name!r}{nearest(name, _endings(found)) or '.'} "
            f"The model's linears are named: {', '.join(_endings(found))}"
        )
    return hits


def _named(
    model: nn.Module, wanted: str | tuple[str, ...], found: Mapping[str, Candidate], read: Set[str]
) -> list[str]:
    if isinstance(wanted, str):
        try:
            matched = {p for p in found if re.fullmatch(wanted, p)}
        except re.error as e:
            raise ConfigError(f"target_modules: got {wanted!r}, which is not a regular expression ({e})") from e
    else:
        matched = {p for name in wanted for p in _matching(model, "target_modules", name, found)}
    for path in sorted(matched):
        refuse(model, path, read)
    return [p for p in found if p in matched]


def imported(
    model: nn.Module,
    config: MoloraConfig,
    modules: Mapping[str, Mapping[str, tuple[object, object, float]]],
    found: Mapping[str, Candidate],
    read: set[str],
) -> list[str]:
    """Union of the adapters' modules, cut to ``target_modules`` where that was given."""
    union = {path for m in modules.values() for path in m}
    union = {path for path in union if not any(ends_with(path, e) for e in config.exclude_modules)}
    for path in sorted(union):
        refuse(model, path, read)
    if len(modules) > 1 and not any(sum(path in m for m in modules.values()) > 1 for path in union):
        raise AdapterError(f"adapters {list(modules)}: no module is adapted by two of them, so there is nothing to mix")
    return targeted(model, config, found, union, read)
