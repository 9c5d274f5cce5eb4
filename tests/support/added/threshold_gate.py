"""A gate that takes one number more a token: the threshold that an expert's logit has to pass."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from molora.config.options import GateOptions
from molora.config.strict import at_least
from molora.routers import GATES
from molora.routers.gates import Gate
from molora.routing import Routing


@dataclass(frozen=True, kw_only=True)
class ThresholdConfig(GateOptions):
    """``slope``: how sharply a logit above the threshold opens the expert."""

    kind: str = "threshold"
    slope: float = 2.0

    def faults(self) -> list[str]:
        """Values out of range."""
        return super().faults() + at_least("slope", self.slope, 1e-3)


class Threshold(Gate):
    """``w_e = sigmoid(slope (logit_e - h))`` with h from the router, for every expert."""

    options, extras = ThresholdConfig, 1

    @classmethod
    def route(
        cls,
        logits_TE: Tensor,
        options: ThresholdConfig,
        top_k: int | None,
        *,
        extras_TX: Tensor | None = None,
        bias_E: Tensor | None = None,
        rows: int = 1,
    ) -> Routing:
        """Dense weights in (0, 1)."""
        assert extras_TX is not None
        weights_TE = (options.slope * (logits_TE.float() - extras_TX.float())).sigmoid()
        return Routing(weights_TE, None, weights_TE, logits_TE)


GATES["threshold"] = Threshold
