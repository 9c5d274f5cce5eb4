"""Record where the tokens go, without changing what the model computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from molora import context
from molora.errors import ConfigError
from molora.model import MixtureModel
from molora.routing import Routing

__all__ = ["RecordedRouting", "RoutingTape", "record_routing"]


class RecordedRouting(Routing):
    """A :class:`Routing` on the CPU, detached, with ``valid`` (T,) bool (real tokens) and ``rows`` (B)."""

    def __init__(
        self, weights: Tensor, ids: Tensor | None, probs: Tensor, logits: Tensor, valid: Tensor, rows: int
    ) -> None:
        super().__init__(weights, ids, probs, logits)
        self.valid, self.rows = valid, rows


class RoutingTape(dict[str, list[RecordedRouting]]):
    """Site path to one :class:`RecordedRouting` per forward of the model, in order."""

    def add(self, site: str, routing: Routing, valid_BS: Tensor) -> None:
        """Append one forward of one site; copies, so later changes of the tensors do not reach the tape."""

        def keep(t: Tensor) -> Tensor:
            return t.detach().to("cpu", copy=True)

        record = RecordedRouting(
            weights=keep(routing.weights),
            ids=None if routing.ids is None else keep(routing.ids),
            probs=keep(routing.probs),
            logits=keep(routing.logits),
            valid=keep(valid_BS.reshape(-1)),
            rows=valid_BS.shape[0],
        )
        self.setdefault(site, []).append(record)


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingTape]:
    """Within the block and this thread, every forward of ``model`` leaves its routing on the tape.

    No effect on outputs, training or balance statistics. A block's router is recorded once, at its leading site.

    Raises:
        ConfigError: when the model was not converted.
    """
    if not isinstance(model, MixtureModel):
        raise ConfigError(
            f"record_routing: got a plain {type(model).__name__}, expected a model that convert() returned"
        )
    tape = RoutingTape()
    with context.taping(model._molora.owner, tape):
        yield tape
