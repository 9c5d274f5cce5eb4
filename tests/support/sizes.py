"""Which parameters a mixture trains on the tiny models, by name and size: arithmetic over names, without the package's
own search for sites.
"""

from __future__ import annotations

from typing import Any

import torch

from molora.config import MoloraConfig, PerLayer, Placement
from molora.initialisers import trains
from molora.routers import ROUTERS, LinearRouter
from tests.support import tiny
from tests.support.tiny import ADAPTER_RANKS
from tests.support.traits import Traits

__all__ = ["FFN", "HIDDEN", "LAYERS", "linears", "parts", "placed", "trained"]

LAYERS, HIDDEN = 2, 32  # of every model of BUILDERS, a T5's encoder and decoder each
# The linears of each tiny model's feed-forward block, in the order they run: the tests may name them, the code may not.
FFN = {
    "llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "qwen3": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    "phi3": ("mlp.gate_up_proj", "mlp.down_proj"),
    "gpt2": ("mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "t5": ("DenseReluDense.wi", "DenseReluDense.wo"),
    "bert": ("0.intermediate.dense", "1.intermediate.dense", "0.output.dense", "1.output.dense"),
    "vit": ("mlp.fc1", "mlp.fc2"),
}


def linears(name: str) -> dict[str, tuple[int, int]]:
    """(in, out) of each linear of the layers, by path."""
    found = {
        p: m
        for p, m in tiny.base_model(name).named_modules()
        if type(m).__name__ in ("Linear", "Conv1D") and any(c.isdigit() for c in p.split("."))
    }
    return {p: (m.nx, m.nf) if hasattr(m, "nf") else (m.in_features, m.out_features) for p, m in found.items()}


def parts(name: str) -> tuple[list[str], list[str]]:
    """The linears of feed-forward blocks, and the first of each block, at which its router stands."""
    ffn = [p for p in linears(name) if p.endswith(FFN[name]) and ".attention." not in p]
    return ffn, [p for p in ffn if p.endswith(FFN[name][0]) or ".intermediate." in p]


def layer_of(path: str) -> int:
    return next(int(c) for c in path.split(".") if c.isdigit())


def _at(value: PerLayer, layer: int) -> int:
    """Of a value for each part of the layers, the one of ``layer``."""
    return value if isinstance(value, int) else value[layer * len(value) // LAYERS]


def _router(p: Placement, d_in: int, experts: int) -> dict[str, int]:
    """A linear router has a row for each logit; any other says itself what it has."""
    rows = experts // p.gate.partition
    if ROUTERS[p.router.kind] is LinearRouter:
        return {"weight": rows * d_in, **({"bias": rows} if p.router.bias else {})}
    made: Any = ROUTERS[p.router.kind](d_in, experts, p.router, p.gate, torch.device("meta"))  # type: ignore[arg-type]
    return {n: t.numel() for n, t in made.named_parameters() if t.requires_grad}


def _head(p: Placement, experts: int, sites: int) -> dict[str, int]:
    """The model-wide router: linears from the hidden state to a gate for each expert, at each site or for all."""
    widths = [HIDDEN, *[p.router.size] * (p.router.depth - 1), experts * (sites if p.router.layerwise else 1)]
    out = {}
    for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        out |= {f"{i}.weight": a * b, **({f"{i}.bias": b} if p.router.bias else {})}
    return out


def placed(config: MoloraConfig, name: str) -> dict[str, Placement]:
    """The placement of each linear of the tiny model ``name`` that has one."""
    ffn, _ = parts(name)
    by_select = {p.select: p for p in config.placements}
    found = {path: by_select.get("all") or by_select.get("ffn" if path in ffn else "rest") for path in linears(name)}
    return {path: p for path, p in found.items() if p is not None}


def trained(config: MoloraConfig, name: str) -> dict[str, int]:
    """Trainable parameters by name and size, on every linear of the layers of the tiny model ``name``."""
    out: dict[str, int] = {}
    _, lead = parts(name)
    choosing, adapted, widths = Traits(config).choosing, placed(config, name), linears(name)
    for path, p in adapted.items():
        d_in, d_out = widths[path]
        r, experts = _at(p.r, layer_of(path)), _at(p.num_experts, layer_of(path))
        ranks = r if p.rank_one else r * experts
        if p.rank_one:
            experts = r
        if p.imported:
            ranks, experts = sum(ADAPTER_RANKS), len(ADAPTER_RANKS)
        for side, width, learned in zip("AB", (d_in, d_out), trains(p), strict=True):
            if learned:
                out[f"{path}.bank.lora_{side}"] = ranks * width
        if p in choosing and (p.router.scope == "module" or (p.router.scope == "block" and path in lead)):
            out |= {f"{path}.router.{n}": size for n, size in _router(p, d_in, experts).items()}
    for p in choosing:
        if p.router.scope == "model":
            experts = len(ADAPTER_RANKS) if p.imported else _at(p.num_experts, 0)
            out |= {f"molora_router.layers.{n}": size for n, size in _head(p, experts, len(adapted)).items()}
    return out
