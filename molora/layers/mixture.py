"""What a converted model remembers of its mixture, and whose sites are whose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from molora.config import MoloraConfig, SiteConfig

__all__ = ["HEAD", "Mixture", "Owner", "mixture_of"]

HEAD = "molora_router"  # attribute of the model that holds a model-wide router


class Owner:
    """Identity of one mixture, held by its sites and its model. ``off``: it computes nothing, in any thread."""

    off = False


@dataclass
class Mixture:
    """What a converted model remembers: its config and sites, and how it was before."""

    config: MoloraConfig
    sites: tuple[SiteConfig, ...]
    owner: Owner
    base_class: type[nn.Module]
    trainable: tuple[str, ...]
    fingerprint: dict[str, object] = field(default_factory=dict)
    penalised: tuple[Any, ...] = ()  # the sites with a bank whose placement has penalties


def mixture_of(model: nn.Module) -> Mixture | None:
    """The mixture in force on a converted model; None for a plain one."""
    found = getattr(model, "_molora", None)
    return found if isinstance(found, Mixture) else None
