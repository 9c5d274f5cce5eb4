"""Balance rules: what keeps experts in use. A new one is a file here and a line in the table."""

from molora.routers.balance.base import Rule, Seen, picks
from molora.routers.balance.pooling import combine, observe_all
from molora.routers.balance.table import BALANCES

__all__ = ["BALANCES", "Rule", "Seen", "combine", "observe_all", "picks"]
