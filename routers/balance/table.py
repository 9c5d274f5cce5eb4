"""The table of balance rules."""

from __future__ import annotations

from molora.routers.balance.base import Rule
from molora.routers.balance.loss_free import Bias
from molora.routers.balance.supervised import Supervised
from molora.routers.balance.switch import Switch
from molora.routers.balance.z_loss import ZLoss

__all__ = ["BALANCES"]

BALANCES: dict[str, type[Rule]] = {
    "switch": Switch,
    "z": ZLoss,
    "supervised": Supervised,
    "bias": Bias,
}
