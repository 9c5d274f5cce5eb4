"""The tensors of named mixtures, between the keys of a model's state dict and those of an adapter folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from molora.adapter.folder import check_tensors
from molora.adapter.names import PREFIX
from molora.adapter.safetensors_file import write_tensors
from molora.errors import AdapterError, CheckpointError
from molora.initialisers import start_of
from molora.layers.mixture import HEAD, Mixture
from molora.surgery.state import saved_tensors

__all__ = ["digest", "keys_of", "to_load", "to_save", "trained"]


def trained(mixture: Mixture, names: Iterable[str]) -> set[str]:
    """Those of the canonical ``names`` that the recipe trains."""
    places = {s.path: mixture.config.placements[s.placement] for s in mixture.sites}
    head = any(p.router.train for p in mixture.config.placements if p.router.scope == "model")
    out = set()
    for name in names:
        bank, router = (places.get(name.rpartition(f".{part}.")[0]) for part in ("bank", "router"))
        if name.startswith(f"{HEAD}."):
            learned = head
        elif bank is not None:
            learned = {"lora_A": True, "lora_B": start_of(bank).trains_B}.get(name.rpartition(".")[2], False)
            learned = learned and bank.train_experts
        else:
            learned = router is None or router.router.train  # neither: a module trained whole
        out |= {name} if learned else set()
    return out


def keys_of(holder: nn.Module, place: str) -> dict[str, str]:
    """Canonical names of the mixture on ``holder`` to its keys, which begin with ``place``."""
    return saved_tensors(holder, {key: place + key for key in holder.state_dict(keep_vars=True)})


def to_save(name: str, mixture: Mixture, tensors: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """What an adapter folder gets, under PEFT's names.

    Raises:
        CheckpointError: where a tensor is missing, of another shape (in pieces, as ZeRO-3 leaves it) or not finite.
    """
    found = {n: t.detach() for n, t in tensors.items() if t is not None}
    check_tensors(f"adapter {name!r}", mixture.config, mixture.sites, found)
    digest(found)
    return {PREFIX + n: t for n, t in found.items()}


def to_load(name: str, mixture: Mixture, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an adapter folder by canonical name.

    Raises:
        AdapterError: for missing, unknown or misshapen ones.
    """
    given = {n.removeprefix(PREFIX): t for n, t in tensors.items()}
    try:
        check_tensors(f"adapter {name!r}", mixture.config, mixture.sites, given)
    except CheckpointError as e:
        raise AdapterError(str(e)) from e
    return given


class _Nowhere:
    def write(self, data: Any) -> int:
        return len(data)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the weights file with these tensors.

    Raises:
        CheckpointError: for NaN or infinite values.
    """
    return write_tensors(cast(Any, _Nowhere()), {PREFIX + n: t.detach() for n, t in tensors.items()})
