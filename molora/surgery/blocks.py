"""Feed-forward blocks, found by what a model computes.

In a recorded shape-only forward, a linear is a *down* projection when everything that flows into it comes from linears
that read one and the same tensor (the *up* side), through operations that touch no parameter and keep tokens apart.
The operations are then replayed on small random numbers, once with a slot axis and once without, to see whether the
axis may stay, and beside ``act(u) * v``, to see whether the block is a gated linear unit.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from molora.activations import ACTIVATIONS, activate
from molora.surgery.trace import Call, Trace

__all__ = ["FFNBlock", "ffn_blocks"]


@dataclass(frozen=True)
class FFNBlock:
    """A feed-forward block: up-side linears in the order they run, the down linear, and whether slots may stay.

    ``act`` and ``gated``: where the middle is ``act(u) * v`` of two linears and nothing else, the activation and the
    linear that makes u; both empty otherwise.
    """

    ups: tuple[str, ...]
    down: str
    slots: bool
    act: str = ""
    gated: str = ""


def ffn_blocks(record: Trace) -> list[FFNBlock]:
    """Every feed-forward block of the recorded forward, in order."""
    makers: dict[int, list[int]] = {}
    for i, (_, _, _, outs) in enumerate(record.ops):
        for t in outs:
            makers.setdefault(id(t), []).append(i)
    by_out = {id(c.out): c for c in record.calls}
    known: dict[str, _Kind | None] = {}
    with torch.random.fork_rng(devices=[]):  # a replayed dropout draws
        blocks = [b for down in record.calls if (b := _block(record, makers, by_out, down, known)) is not None]
    apart: list[FFNBlock] = []
    for b in blocks:
        if not {b.down, *b.ups} & {path for other in apart for path in (*other.ups, other.down)}:
            apart.append(b)
    return apart


def _inputs(op: tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]) -> Iterator[Tensor]:
    return (t for t in tree_flatten((op[1], op[2]))[0] if isinstance(t, Tensor))


def _block(
    record: Trace, makers: dict[int, list[int]], by_out: dict[int, Call], down: Call, known: dict[str, _Kind | None]
) -> FFNBlock | None:
    """The block that ends in ``down``, or None: walk back to linears, check widths, tokens and slots.

    ``known``: by a middle's form, what it is (None: no block), so that equal layers are tried once.
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
        known[form] = _Kind(middle.carries_slots(), *middle.unit()) if middle.keeps_tokens_apart() else None
    kind = known[form]
    if kind is None:
        return None
    paths = tuple(c.path for c in calls)
    return FFNBlock(paths, down.path, kind.slots, kind.act, paths[kind.gated] if kind.act else "")


class _Kind(NamedTuple):
    """What a middle is: whether slots may stay; of a gated linear unit, its activation and which linear it is on."""

    slots: bool
    act: str = ""
    gated: int = 0


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

    def replay(self, *inputs: list[Tensor]) -> list[Tensor] | None:
        """The result of each run, or None where the recorded operations do not take these numbers."""
        try:
            return [self.run(values) for values in inputs]
        except (RuntimeError, KeyError, TypeError, ValueError, IndexError, NotImplementedError):
            return None

    def keeps_tokens_apart(self) -> bool:
        """Whether changing one token's values changes that token's result and no other."""
        values, changed = self._numbers(0), []
        for v, o in zip(values, self._numbers(1), strict=True):
            c = v.clone()
            c.view(-1, v.shape[-1])[0] = o.view(-1, v.shape[-1])[0]
            changed.append(c)
        ran = self.replay(values, changed)
        if ran is None:
            return False
        a, b = ran
        width = self.down.x.shape[-1]
        same = (a.reshape(-1, width) == b.reshape(-1, width)).all(-1)
        return bool(same[1:].all()) and not bool(same[0])

    def unit(self) -> tuple[str, int]:
        """(act, i) where the middle is ``act(u_i) * u_j``, also on a last dimension of 1; ("", 0) otherwise."""
        if len(self.ups) != 2 or self.ups[0].out.shape != self.ups[1].out.shape:
            return "", 0
        values = [3 * v for v in self._numbers(2)]  # wide enough to tell the two forms of GELU apart
        thin = [v[..., :1].clone() for v in values]
        ran = self.replay(values, thin)
        if ran is None:
            return "", 0
        whole, single = ran
        for act, (i, j) in itertools.product(ACTIVATIONS, ((0, 1), (1, 0))):
            pairs = (whole, values), (single, thin)
            if all(_close(got, activate(act, v[i]) * v[j], 1e-6) for got, v in pairs):
                return act, i
        return "", 0

    def carries_slots(self) -> bool:
        """Whether running two slots on a new axis before the last equals running them one by one."""
        values, others = self._numbers(0), self._numbers(1)
        ran = self.replay([torch.stack((v, o), -2) for v, o in zip(values, others, strict=True)], values, others)
        return ran is not None and _close(ran[0], torch.stack(ran[1:], -2), 1e-5)


def _close(a: Tensor, b: Tensor, rtol: float) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, rtol=rtol, atol=1e-6))


def _without_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "device"}
