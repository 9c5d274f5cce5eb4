"""Penalties: terms of the loss on the experts' parameters alone. A new one is a file here and a line in the table.

``molora/forward/penalty_loss.py`` adds them to the loss. They stand below ``recipes/``, whose check asks the table.
"""

from molora.penalties.base import Penalty
from molora.penalties.orthogonal import Orthogonal

__all__ = ["PENALTIES", "Orthogonal", "Penalty"]

PENALTIES: dict[str, type[Penalty]] = {
    "orthogonal": Orthogonal,
}
