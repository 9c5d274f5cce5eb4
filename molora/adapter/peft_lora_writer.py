"""PEFT LoRA folders, written without PEFT: an expert becomes an adapter."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from molora.adapter.atomic_save import save_folder
from molora.adapter.names import PREFIX, exact_pattern
from molora.adapter.peft_lora import Module
from molora.adapter.peft_lora_config import PEFT_TYPE
from molora.adapter.peft_lora_stacked import to_file
from molora.errors import CheckpointError

__all__ = ["write_peft_lora"]


def write_peft_lora(
    folder: str | os.PathLike[str],
    *,
    modules: Mapping[str, Module],
    base_model_name: str | None,
    card: str | None = None,
    fused: Mapping[str, tuple[Tensor, Tensor, float, int]] | None = None,
    saved: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Save ``modules`` (path to A (r, in), B (out, r), scale) as a folder that PEFT loads and computes alike.

    Modules of rank 0 are left out. ``fused``: path of a stacked parameter, those of a module in its order, to A (E r,
    in), B (out, E r), scale and E. ``saved``: path of a module that was trained whole to its tensors by name (PEFT's
    ``modules_to_save``). ``card`` becomes the README.md. Staged like molora's own folders, but PEFT checks
    no digest: a crash while an export is written over an older one may leave the new weights beside the old config.

    Raises:
        CheckpointError: when nothing is left to save, or the folder cannot be written or holds something else.
    """
    kept = {path: m for path, m in modules.items() if m[0].shape[0]}
    stacks = dict(fused or {})
    if not kept and not stacks:
        raise CheckpointError(f"{folder}: got no module of rank 1 or more, expected something to save")
    ranks = {path: A.shape[0] for path, (A, _, _) in kept.items()}
    ranks |= {path: A.shape[0] // E for path, (A, _, _, E) in stacks.items()}
    scales = {path: m[2] for path, m in kept.items()} | {path: m[2] for path, m in stacks.items()}
    alphas = {path: _whole(scale * ranks[path]) for path, scale in scales.items()}
    r, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": None,
        "base_model_name_or_path": base_model_name or None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {exact_pattern(p): n for p, n in ranks.items() if n != r},
        "alpha_pattern": {exact_pattern(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": sorted(kept),
        **({"target_parameters": sorted(stacks)} if stacks else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": sorted(saved) if saved else None,
    }
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
    pairs = {path: m[:2] for path, m in kept.items()} | to_file(stacks)
    tensors = {f"{PREFIX}{p}.lora_{x}.weight": t for p, m in pairs.items() for x, t in zip("AB", m, strict=True)}
    tensors |= {f"{PREFIX}{p}.{name}": t for p, own in (saved or {}).items() for name, t in own.items()}
    save_folder(Path(folder), peft_type=PEFT_TYPE, tensors=tensors, describe=lambda _: text, card=card)


def _whole(value: float) -> float | int:
    """Numbers that are whole as integers, the way PEFT writes them."""
    return int(value) if value == int(value) else value
