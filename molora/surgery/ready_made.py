"""Ready-made LoRAs: read in terms of a model, and copied into the experts that stand beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from molora.adapter.atomic_save import CONFIG
from molora.adapter.peft_lora import LoraAdapter, read_peft_lora, renaming
from molora.adapter.peft_lora_stacked import placed
from molora.config import MoloraConfig
from molora.errors import AdapterError
from molora.layers.linear import MixtureLinear
from molora.seeds import generator
from molora.surgery.build import Built
from molora.surgery.targets import candidates

__all__ = ["aligned", "copy_in", "on_cpu", "warm_start"]


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Within the block, tensors without a device of their own are made on the CPU and can be trained.

    That is so in most programs; not under ``torch.set_default_device``, ``with torch.device(...)`` or inference mode.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        yield


def aligned(
    model: nn.Module, name: str, folder: str, *, allow_pickle: bool = False, alone: bool = False
) -> LoraAdapter:
    """The PEFT LoRA folder with its paths in terms of ``model``.

    ``alone``: it will not be mixed, so it may have whole trained modules and LoRAs of the base's own experts.

    Raises:
        AdapterError: for a folder that cannot be read, or that was made for linears of other widths.
    """
    adapter = read_peft_lora(folder, allow_pickle=allow_pickle, allow_saved=alone, allow_stacked=alone)
    paths = [p for p, _ in model.named_modules() if p]
    try:
        new_name = renaming(adapter, paths)
    except AdapterError as e:
        raise AdapterError(f"adapter {name!r} ({folder}): {e}") from e
    modules = {new_name[n]: m for n, m in adapter.modules.items()}
    found = candidates(model)
    for path, (A, B, _) in modules.items():
        if path in found and (A.shape[1], B.shape[0]) != found[path].shape:
            raise AdapterError(
                f"adapter {name!r} ({folder}): {path} is for a linear of {A.shape[1]} to {B.shape[0]}, this model has "
                f"{found[path].shape[0]} to {found[path].shape[1]}: it was made for another base"
            )
    stored = [new_name[n] for n in adapter.parameters]
    turned = [p for p in stored if not hasattr(model.get_submodule(p), "in_features")]
    if turned:
        raise AdapterError(
            f"adapter {name!r} ({folder}): {turned[0]} was reached as a parameter, and this {type(model).__name__} "
            "stores its weight transposed, or it is no linear; train the adapter with target_modules instead"
        )
    for (path, leaf), t in adapter.bases.items():
        if not _is_own(t, getattr(model.get_submodule(new_name[path]), leaf, None)):
            raise AdapterError(
                f"adapter {name!r} ({folder}): it brings a {leaf} for {new_name[path]} that is not this base's: it was "
                "trained on another base, or one that was changed or resized; load that one"
            )
    parts = {n: n.rpartition(".") for n in adapter.saved}
    saved = {f"{new_name[parts[n][0]]}.{parts[n][2]}": t for n, t in adapter.saved.items()}
    fused = placed(Path(folder) / CONFIG, adapter.settings, adapter.stacks, model, new_name)
    return replace(adapter, modules=modules, saved=saved, parameters=tuple(stored), fused=fused, stacks={})


def _is_own(t: torch.Tensor, own: object) -> bool:
    """Whether ``t`` is the base's tensor in the base's precision; where it has no storage, of its shape."""
    if not isinstance(own, torch.Tensor) or own.shape != t.shape:
        return False
    return own.is_meta or torch.equal(own.cpu(), t.to(own.dtype))


def copy_in(built: Built, adapters: Mapping[str, LoraAdapter]) -> None:
    """Copy ready-made adapters in as experts, in the order of the config."""
    for path, site in built.routed().items():
        if isinstance(site, MixtureLinear) and site.bank is not None and site.placement.imported:
            for e, adapter in enumerate(adapters.values()):
                if path in adapter.modules:
                    A, B, _ = adapter.modules[path]
                    site.bank.set_expert(e, A, B)


def warm_start(built: Built, adapter: LoraAdapter, config: MoloraConfig, seed: int) -> None:
    """Copy one trained LoRA into every expert, with noise of ``init_noise`` times each matrix's own spread.

    Where several experts stand side by side only; the delta keeps its size, whatever the two scales are.
    """
    used = set()
    for path, site in built.routed().items():
        if not isinstance(site, MixtureLinear) or site.bank is None or path not in adapter.modules:
            continue
        A, B, scale = adapter.modules[path]
        used.add(path)
        for e, (r, own) in enumerate(zip(site.bank.ranks, site.bank.scales, strict=True)):
            if A.shape[0] != r:
                raise AdapterError(
                    f"init_from: {path}: the folder has rank {A.shape[0]}, this mixture's experts have rank {r}; "
                    f"convert with r={A.shape[0]}"
                )
            noise = config.init_noise if site.site.num_experts > 1 else 0.0
            rng = generator(seed, path, "init_from", str(e))
            parts = [
                t.float() + noise * _spread(t) * torch.randn(t.shape, generator=rng) for t in (A, B * (scale / own))
            ]
            site.bank.set_expert(e, *parts)
    if not used:
        raise AdapterError(f"init_from: {config.init_from}: none of its modules is adapted by this mixture")


def _spread(t: torch.Tensor) -> float:
    return float(t.float().std()) if t.numel() > 1 else 0.0
