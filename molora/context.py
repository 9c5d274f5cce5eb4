"""What the sites of a model need to know during one forward: masks, model-wide gates, the off switch, losses.

Thread-local at module level: a ContextVar breaks ``torch.compile(fullgraph=True)``, state on the model breaks
deepcopy and threads. Activation checkpointing recomputes a layer after the forward is over, with a snapshot of the
frame from :func:`checkpoint_contexts`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from molora.config.options import BalanceOptions
from molora.errors import ConfigError
from molora.routing import Routing

__all__ = ["Frame", "Observation", "Report", "both_contexts", "checkpoint_contexts", "current", "edited", "editing"]
__all__ += ["editor_of", "here", "is_off", "scratch", "switched_off", "tape_of", "taping", "units", "use"]
__all__ += ["valid_tokens"]

Editor = Callable[[str, Routing, Tensor], Routing]  # site path, what its router decided, real tokens (B, S) bool


@dataclass
class Report:
    """What a router leaves for one balance rule; the rules look at it when the forward is over."""

    site: str
    layer: int
    stream: str
    rule: BalanceOptions
    routing: Routing
    valid_BS: Tensor
    task_BS: Tensor | None


@dataclass
class Observation:
    """What one balance rule saw at one router in one forward: (B, ...) tensors and where they came from."""

    site: str
    layer: int
    rule: BalanceOptions
    num_experts: int
    tensors: tuple[Tensor, ...]
    valid_B: Tensor


@dataclass
class Frame:
    """State of one forward of one converted model.

    ``masks``: stream name to (B, S) bool, True = a real token; a missing stream has no padding. ``rows``: B.
    ``gates``: one routing a site, from a model-wide router. ``pass_value``: set during a scaling pass, the
    constant that multiplies every expert. ``observations``: where routers report, None when nothing is collected.
    ``task_ids``: (B,) or (B, S). ``tape``: site path to recorded routings. ``recompute``: in a checkpoint's recompute.
    ``valid`` and ``shared``: real tokens by stream and length, and the routings of blocks, computed once a forward.
    ``units``: by block, what the up-side linears of a gated unit left for its down linear.
    ``editor``: changes what the routers decided before anyone uses it, see :func:`editing`.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 1
    gates: tuple[Routing, ...] | None = None
    pass_value: float | None = None
    observations: list[Report] | None = None
    task_ids: Tensor | None = None
    tape: Any = None
    recompute: bool = False
    valid: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    shared: dict[str, Routing] = field(default_factory=dict)
    units: dict[str, Any] = field(default_factory=dict)
    editor: Editor | None = None


class _State(threading.local):
    frame: Frame | None = None
    off: tuple[object, ...] = ()
    tapes: tuple[tuple[object, Any], ...] = ()
    editors: tuple[tuple[object, Editor], ...] = ()

    def __init__(self) -> None:
        self.shared: dict[str, Routing] = {}
        self.units: dict[str, Any] = {}


_state = _State()


def current() -> Frame | None:
    """The frame of the running forward in this thread, or None outside of one."""
    return _state.frame


def here(owner: Any) -> tuple[bool, Frame | None]:
    """:func:`is_off` and :func:`current` at once."""
    return is_off(owner), _state.frame


def scratch() -> dict[str, Routing]:
    """Where the router of a block leaves its routing for the block's other linears."""
    return _state.shared if _state.frame is None else _state.frame.shared


def units() -> dict[str, Any]:
    """By block, the gated unit that its up-side linears fill for its down linear."""
    return _state.units if _state.frame is None else _state.frame.units


@contextlib.contextmanager
def use(frame: Frame | None) -> Iterator[None]:
    """Make ``frame`` current; the previous one comes back however the block ends."""
    before = _state.frame
    _state.frame = frame
    try:
        yield
    finally:
        _state.frame = before


@contextlib.contextmanager
def switched_off(owner: object) -> Iterator[None]:
    """Within the block, the experts of ``owner``'s model are off in this thread; nests, survives exceptions."""
    before = _state.off
    _state.off = (*before, owner)
    try:
        yield
    finally:
        _state.off = before


def is_off(owner: Any) -> bool:
    """Whether the experts of ``owner``'s model are switched off, in this thread or altogether."""
    return owner.off or (bool(_state.off) and any(o is owner for o in _state.off))


@contextlib.contextmanager
def taping(owner: object, tape: Any) -> Iterator[None]:
    """Within the block, forwards of ``owner``'s model in this thread record their routing on ``tape``."""
    before = _state.tapes
    _state.tapes = (*before, (owner, tape))
    try:
        yield
    finally:
        _state.tapes = before


def tape_of(owner: object) -> Any:
    """The innermost tape of ``owner``'s model in this thread, or None."""
    return next((t for o, t in reversed(_state.tapes) if o is owner), None)


@contextlib.contextmanager
def editing(owner: object, editor: Editor) -> Iterator[None]:
    """Within the block, the experts of ``owner``'s model in this thread get what ``editor`` makes of each decision.

    Called once a decision, not in a scaling pass nor where every expert always counts 1; returns a routing of the same
    tokens and experts with any number of slots, which tapes see too. A forward that records gradients raises.
    """
    before = _state.editors
    _state.editors = (*before, (owner, editor))
    try:
        yield
    finally:
        _state.editors = before


def editor_of(owner: object) -> Editor | None:
    """The innermost editor of ``owner``'s model in this thread, or None."""
    return next((e for o, e in reversed(_state.editors) if o is owner), None)


def edited(frame: Frame, site: str, stream: str, routing: Routing) -> Routing:
    """What the frame's editor, if there is one, makes of the decision of the router at ``site``."""
    if frame.editor is None:
        return routing
    return frame.editor(site, routing, valid_tokens(frame, stream, len(routing.weights), routing.weights.device))


def valid_tokens(frame: Frame, stream: str, tokens: int, device: torch.device) -> Tensor:
    """Which of ``tokens`` flattened tokens are real, (B, S) bool. A mask longer than S (a cache) keeps its end.

    Raises:
        ConfigError: when the mask cannot belong to so many tokens.
    """
    key = (stream, tokens)
    if key not in frame.valid:
        mask_BS = frame.masks.get(stream)
        rows = frame.rows if mask_BS is None else mask_BS.shape[0]
        if tokens % rows:
            rows, mask_BS = 1, None
        length = tokens // rows
        if mask_BS is None:
            frame.valid[key] = torch.ones(rows, length, dtype=torch.bool, device=device)
        elif mask_BS.shape[1] < length:
            raise ConfigError(
                f"{stream}: got shape {tuple(mask_BS.shape)} for {rows} rows of {length} tokens, expected at least "
                "one column per token; pass a mask that covers the input"
            )
        else:
            frame.valid[key] = mask_BS[:, mask_BS.shape[1] - length :]
    return frame.valid[key]


def checkpoint_contexts() -> tuple[contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]]:
    """``context_fn`` of ``torch.utils.checkpoint``: nothing in the forward, its frame and off switch in the recompute.

    The recompute must run the same operations, so it reports to a list of its own that is thrown away.
    """
    frame = _state.frame
    again = None
    if frame is not None:
        again = replace(
            frame,
            observations=None if frame.observations is None else [],
            tape=None,
            recompute=True,
            shared={},
            units={},
            valid={},
        )
    return contextlib.nullcontext(), _as_it_was(again, _state.off)


@contextlib.contextmanager
def _as_it_was(frame: Frame | None, off: tuple[object, ...]) -> Iterator[None]:
    before = _state.frame, _state.off
    _state.frame, _state.off = frame, off
    try:
        yield
    finally:
        _state.frame, _state.off = before


def both_contexts(first: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """Contexts of a caller's own ``context_fn`` around molora's; bound with functools.partial, so that it pickles."""
    theirs, ours = first(), checkpoint_contexts()
    return _both(theirs[0], ours[0]), _both(theirs[1], ours[1])


@contextlib.contextmanager
def _both(outer: Any, inner: Any) -> Iterator[None]:
    with outer, inner:
        yield
