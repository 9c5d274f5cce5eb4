"""Feed-forward blocks, found by what a model computes.

In a recorded shape-only forward, a linear is a *down* projection when everything that flows into it comes from linears
that read one and the same tensor (the *up* side), through operations that touch no parameter and keep tokens apart.
The operations are then replayed on small random numbers, once with a slot axis and once without, to see whether the
axis may stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from molora.trace import Call, Trace

__all__ = ["FFNBlock", "ffn_blocks"]


@dataclass(frozen=True)
class FFNBlock:
    """A feed-forward block: up-side linears in the order they run, the down linear, and whether slots may stay."""

    ups: tuple[str, ...]
    down: str
    slots: bool


def ffn_blocks(record: Trace) -> list[FFNBlock]:
    """Every feed-forward block of the recorded forward, in order."""
    makers: dict[int, list[int]] = {}
    for i, (_, _, _, outs) in enumerate(record.ops):
        for t in outs:
            makers.setdefault(id(t), []).append(i)
    by_out = {id(c.out): c for c in record.calls}
    known: dict[str, bool | None] = {}
    blocks = [b for down in record.calls if (b := _block(record, makers, by_out, down, known)) is not None]
    apart: list[FFNBlock] = []
    for b in blocks:
        if not {b.down, *b.ups} & {path for other in apart for path in (*other.ups, other.down)}:
            apart.append(b)
    return apart


def _inputs(op: tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]) -> Iterator[Tensor]:
    return (t for t in tree_flatten((op[1], op[2]))[0] if isinstance(t, Tensor))


def _block(
    record: Trace, makers: dict[int, list[int]], by_out: dict[int, Call], down: Call, known: dict[str, bool | None]
) -> FFNBlock | None:
    """The block that ends in ``down``, or None: walk back to linears, check widths, tokens and slots.

    ``known``: by a middle's form, whether slots may stay (None: no block), so that equal layers are tried once.
    """
    ups: dict[int, Call] = {}
    needed: set[int] = set()
    todo, done = [down.x], set()
    while todo:
        t = todo.pop()
        if id(t) in done:
            continue
        done.add(id(t))
        if id(t) in by_out:
            ups[id(t)] = by_out[id(t)]
            continue
        ops = [i for i in makers.get(id(t), []) if i <= down.op]
        if not ops or len(needed) > 64:
            return None  # a parameter, a model input or a long way: not a plain middle
        for i in ops:
            needed.add(i)
            todo.extend(_inputs(record.ops[i]))
    calls = sorted(ups.values(), key=lambda c: c.op)
    if not calls or any(c.x is not calls[0].x for c in calls):
        return None
    d, f = down.out.shape[-1], down.x.shape[-1]
    if any(c.x.shape[-1] != d or c.out.shape[-1] not in (f, 2 * f) for c in calls):
        return None
    middle = _Middle(record, sorted(needed), calls, down)
    form = middle.form()
    if form not in known:
        known[form] = middle.carries_slots() if middle.keeps_tokens_apart() else None
    slots = known[form]
    return None if slots is None else FFNBlock(tuple(c.path for c in calls), down.path, slots)


class _Middle:
    """The recorded operations between the up side and the down linear, to be run again on real numbers."""

    def __init__(self, record: Trace, ops: list[int], ups: list[Call], down: Call) -> None:
        self.ops = [record.ops[i] for i in ops]
        self.ups, self.down = ups, down

    def form(self) -> str:
        """Equal for middles that compute the same: operations, their plain arguments, and who feeds whom."""
        made = [t for _, _, _, outs in self.ops for t in outs]
        names = {id(t): f"{i}:{tuple(t.shape)}" for i, t in enumerate([*(c.out for c in self.ups), *made])}
        parts = [
            (str(func), tree_map_only(Tensor, lambda t: names.get(id(t), "unknown"), (args, kwargs)))
            for func, args, kwargs, _ in self.ops
        ]
        return repr((len(self.ups), parts, names.get(id(self.down.x))))

    def _numbers(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(c.out.shape, generator=generator) for c in self.ups]

    def run(self, values: list[Tensor]) -> Tensor:
        known = {id(c.out): v.clone() for c, v in zip(self.ups, values, strict=True)}
        for func, args, kwargs, outs in self.ops:
            real = tree_map_only(Tensor, lambda t: known[id(t)], (args, _without_device(kwargs)))
            made = [t for t in tree_flatten(func(*real[0], **real[1]))[0] if isinstance(t, Tensor)]
            known.update((id(o), m) for o, m in zip(outs, made, strict=True))
        return known[id(self.down.x)]

    def keeps_tokens_apart(self) -> bool:
        """Whether changing one token's values changes that token's result and no other."""
        values, changed = self._numbers(0), []
        for v, o in zip(values, self._numbers(1), strict=True):
            c = v.clone()
            c.view(-1, v.shape[-1])[0] = o.view(-1, v.shape[-1])[0]
            changed.append(c)
        try:
            a, b = self.run(values), self.run(changed)
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError, NotImplementedError):
            return False
        width = self.down.x.shape[-1]
        same = (a.reshape(-1, width) == b.reshape(-1, width)).all(-1)
        return bool(same[1:].all()) and not bool(same[0])

    def carries_slots(self) -> bool:
        """Whether running two slots on a new axis before the last equals running them one by one."""
        values, others = self._numbers(0), self._numbers(1)
        try:
            together = self.run([torch.stack((v, o), -2) for v, o in zip(values, others, strict=True)])
            apart = torch.stack((self.run(values), self.run(others)), -2)
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError, NotImplementedError):
            return False
        return together.shape == apart.shape and bool(torch.allclose(together, apart, rtol=1e-5, atol=1e-6))


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "device"}
