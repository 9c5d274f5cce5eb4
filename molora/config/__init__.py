"""What a mixture is, as frozen data: its placements, their options, and the resolved sites."""

from molora.config.banks import AlwaysOn
from molora.config.options import BalanceConfig, GateConfig, RouterConfig
from molora.config.placements import MoloraConfig, Placement, per_layer
from molora.config.site import SiteConfig
from molora.config.strict import PerLayer, Strict

__all__ = [
    "AlwaysOn",
    "BalanceConfig",
    "GateConfig",
    "MoloraConfig",
    "PerLayer",
    "Placement",
    "RouterConfig",
    "SiteConfig",
    "Strict",
    "per_layer",
]
