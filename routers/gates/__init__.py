"""Gate functions: a router's logits to weights and ids."""

from molora.routers.gates.choice import gate

__all__ = ["gate"]
