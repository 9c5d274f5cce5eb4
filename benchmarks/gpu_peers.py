"""The same mixture written in the ways that people write it, each differentiable, for the GPU benchmark.

All take the frozen linear's weight, so that the base product is in every time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from molora.kernels import functional
from molora.kernels.reference import Layout, rank_mix_concat
from molora.kernels.sorted import ops as grouped_ops


class Mixture(NamedTuple):
    """Arguments of one mixture; ``ids`` None: all experts by ``weights`` (T, E)."""

    x: Tensor
    W: Tensor
    A: Tensor
    B: Tensor
    weights: Tensor
    ids: Tensor | None
    layout: Layout

    def leaves(self) -> list[Tensor]:
        """What gradients are taken of."""
        return [self.x, self.A, self.B, self.weights]

    def experts(self) -> list[tuple[Tensor, Tensor]]:
        """A (r, I) and B (O, r) of each expert."""
        r = self.layout.ranks[0]
        return list(zip(self.A.split(r), self.B.split(r, 1), strict=True))

    def groups(self) -> dict[str, Any]:
        """The experts' ranks as the sorted kernels take them."""
        E, r = len(self.layout.ranks), self.layout.ranks[0]
        start_E = torch.arange(E + 1, device=self.x.device) * r
        return {"start_E": start_E, "scale_R": self.layout.scale_R, "max_rank": r}

    def dense(self) -> Tensor:
        """The weights as (T, E)."""
        if self.ids is None:
            return self.weights
        zeros = self.weights.new_zeros(self.x.shape[0], len(self.layout.ranks))
        return zeros.scatter_add(1, self.ids, self.weights)


def mixture(s: Any, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Mixture:
    """Random arguments for a shape, armed; uniform routing."""
    g = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device)

    R, choices = s.E * s.r, s.K or s.E
    ids = draw(s.T, s.E).topk(choices).indices if s.K else None
    expert_R = torch.arange(s.E, device=device).repeat_interleave(s.r)
    ranks, ones = (s.r,) * s.E, torch.full((R,), 2.0, device=device)
    layout = Layout(ranks, (2.0,) * s.E, expert_R, ones)
    leaves = [draw(s.T, s.I).to(dtype), (draw(R, s.I) / s.I**0.5).to(dtype), (draw(s.O, R) / 4).to(dtype)]
    leaves.append(draw(s.T, choices).softmax(-1))
    x, A, B, weights = (t.requires_grad_() for t in leaves)
    return Mixture(x, (draw(s.O, s.I) / s.I**0.5).to(dtype), A, B, weights, ids, layout)


def exact(m: Mixture, rows: int = 256) -> Tensor:
    """The first rows in float64."""
    with torch.no_grad():
        x, gates = m.x[:rows].double(), m.dense()[:rows].double()[:, m.layout.expert_R] * m.layout.scale_R
        return x @ m.W.double().t() + (x @ m.A.double().t() * gates) @ m.B.double().t()


def base_only(m: Mixture) -> Tensor:
    """The frozen linear alone."""
    return linear(m.x, m.W)


def dense_loop(m: Mixture) -> Tensor:
    """Every expert on every token, as adapters one by one."""
    y, gates = linear(m.x, m.W), m.dense().to(m.x.dtype)
    for e, (A, B) in enumerate(m.experts()):
        y = y + linear(linear(m.x, A), B) * gates[:, e : e + 1] * m.layout.scales[e]
    return y


def gather_loop(m: Mixture) -> Tensor:
    """Each expert on the tokens that chose it, with index_add_; waits for the device at every expert."""
    assert m.ids is not None
    y = linear(m.x, m.W)
    for e, (A, B) in enumerate(m.experts()):
        token, slot = torch.where(m.ids == e)
        part = linear(linear(m.x[token], A), B) * m.layout.scales[e]
        y = y.index_add(0, token, part * m.weights[token, slot].unsqueeze(-1).to(y.dtype))
    return y


def grouped_mm(m: Mixture) -> Tensor:
    """Rows gathered by expert, two grouped products, put back, summed over the choices, added."""
    assert m.ids is not None
    (T, K), E, r = m.ids.shape, len(m.layout.ranks), m.layout.ranks[0]
    order = m.ids.flatten().argsort(stable=True)
    ends = torch.searchsorted(m.ids.flatten()[order], torch.arange(E, device=order.device), right=True).int()
    h = torch._grouped_mm(m.x[order // K], m.A.view(E, r, -1).transpose(1, 2), offs=ends)
    out = torch._grouped_mm(h, m.B.view(-1, E, r).permute(1, 2, 0).contiguous(), offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(T * K, device=order.device))
    weighed = out[back].view(T, K, -1) * (m.weights * m.layout.scales[0]).unsqueeze(-1).to(out.dtype)
    return linear(m.x, m.W) + weighed.sum(1)


def scatter(m: Mixture) -> Tensor:
    """Grouped products that gather as they read and scatter as they write, one row for each choice; then summed."""
    assert m.ids is not None
    (T, K), flat = m.ids.shape, m.ids.reshape(-1, 1)
    one = torch.ones(T * K, 1, device=flat.device)
    rows = m.x.unsqueeze(1).expand(T, K, -1).reshape(T * K, -1)
    zeros = torch.zeros(T * K, m.B.shape[0], dtype=m.x.dtype, device=flat.device)
    out = grouped_ops.sorted_mix(zeros, rows, m.A, m.B, one, flat, **m.groups()).view(T, K, -1)
    return linear(m.x, m.W) + (out * m.weights.unsqueeze(-1).to(out.dtype)).sum(1)


def sorted_mix(m: Mixture) -> Tensor:
    """Tokens sorted by expert, one pass for each choice."""
    assert m.ids is not None
    return grouped_ops.sorted_mix(linear(m.x, m.W), m.x, m.A, m.B, m.weights, m.ids, **m.groups())


def eager_concat(m: Mixture) -> Tensor:
    """Ranks side by side in plain PyTorch."""
    return rank_mix_concat(linear(m.x, m.W), m.x, m.A, m.B, m.dense(), m.layout)


def molora(m: Mixture) -> Tensor:
    """The Triton kernels after the base's own product."""
    maps = {"expert_R": m.layout.expert_R, "scale_R": m.layout.scale_R}
    return functional.rank_mix(linear(m.x, m.W), m.x, m.A, m.B, m.weights, m.ids, **maps)


def molora_linear(m: Mixture) -> Tensor:
    """The Triton kernels with the base's product in the same operator."""
    maps = {"expert_R": m.layout.expert_R, "scale_R": m.layout.scale_R}
    return functional.rank_mix_linear(m.x, m.W, None, m.A, m.B, m.weights, m.ids, **maps)


@functools.cache
def _compiled() -> Callable[[Mixture], Tensor]:
    return torch.compile(eager_concat, fullgraph=True, dynamic=False)


def compiled_concat(m: Mixture) -> Tensor:
    """Plain concat under torch.compile."""
    return _compiled()(m)


WAYS: dict[str, Callable[[Mixture], Tensor]] = {
    "base": base_only,
    "dense loop": dense_loop,
    "gather loop": gather_loop,
    "scatter": scatter,
    "grouped_mm": grouped_mm,
    "eager concat": eager_concat,
    "compiled concat": compiled_concat,
    "sorted": sorted_mix,
    "molora": molora,
    "molora linear": molora_linear,
}
