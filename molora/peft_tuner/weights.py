"""The tensors of named mixtures, between the keys of a model's state dict and those of an adapter folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn

from molora.adapter.folder import check_tensors
from molora.adapter.names import PREFIX
from molora.adapter.safetensors_file import write_tensors
from molora.errors import AdapterError, CheckpointError
from molora.initialisers import trains
from molora.layers.banks import expected_shapes, trained_names
from molora.layers.mixture import HEAD, Mixture
from molora.surgery.state import saved_tensors

__all__ = ["digest", "keys_of", "to_load", "to_save", "trained"]


def trained(mixture: Mixture, names: Iterable[str]) -> set[str]:
    """Those of the canonical ``names`` that the recipe trains."""
    places = {s.path: mixture.config.placements[s.placement] for s in mixture.sites}
    banks = {f"{s.path}.{name}" for s in mixture.sites for name in expected_shapes(s)}
    learned_banks = {f"{s.path}.{name}" for s in mixture.sites for name in trained_names(s, *trains(places[s.path]))}
    head = any(p.router.train for p in mixture.config.placements if p.router.scope == "model")
    out = set()
    for name in names:
        router = places.get(name.rpartition(".router.")[0])
        if name.startswith(f"{HEAD}."):
            learned = head
        elif name in banks:
            learned = name in learned_banks
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
