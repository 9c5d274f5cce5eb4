"""Gates: a router's logits to weights and ids. A new one is a file here and a line in the table."""

from molora.routers.gates.base import Gate
from molora.routers.gates.choice import Choice, gate

__all__ = ["GATES", "Choice", "Gate", "gate"]

GATES: dict[str, type[Gate]] = {
    "choice": Choice,
}
