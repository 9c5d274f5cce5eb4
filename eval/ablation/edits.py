"""Other routings than the router's own, for tokens that are not padding: what to compare a mixture with.

Each is a function of what a router decided and of :class:`Scene`. The form stays: chosen experts stay slots with ids,
so that every kernel that took the router's routing takes this one. "Total" is the sum of a token's weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from molora.eval.counting.inputs import digest_of
from molora.routing import Routing

__all__ = ["GATES", "Edit", "Scene", "frozen", "random", "shuffled", "top_1", "uniform"]


class Scene(NamedTuple):
    """Where a decision was made. ``valid_T``: real tokens, bool. ``mean_E``: the router's mean weights over all data.

    Random numbers depend on ``batch``, the same for all routers, or on ``site`` as well.
    """

    valid_T: Tensor
    mean_E: Tensor
    batch: str
    site: str


Edit = Callable[[Routing, Scene], Routing]


def _generator(*names: str) -> torch.Generator:
    """On the CPU, so that every device sees the same numbers."""
    return torch.Generator().manual_seed(digest_of("/".join(names)) >> 1)


def _over_all(r: Routing, weights_TE: Tensor, scene: Scene) -> Routing:
    """These weights, one slot an expert; padding has its own in that form."""
    ids_TE = None if r.ids is None else torch.arange(r.num_experts, device=r.ids.device).repeat(len(r.ids), 1)
    return r.decided(torch.where(scene.valid_T.unsqueeze(1), weights_TE, r.dense()), ids_TE)


def uniform(r: Routing, scene: Scene) -> Routing:
    """The token's total spread evenly over all E experts."""
    return _over_all(r, r.weights.sum(1, keepdim=True) / r.num_experts, scene)


def frozen(r: Routing, scene: Scene) -> Routing:
    """The router's mean weights for every token: its preferences without its choices."""
    return _over_all(r, scene.mean_E.to(r.weights), scene)


def shuffled(r: Routing, scene: Scene) -> Routing:
    """Each token gets the decisions of another real token of the batch, the same one's at every router: loads stay."""
    at_N = scene.valid_T.nonzero().flatten()
    order_N = torch.randperm(len(at_N), generator=_generator(scene.batch)).to(at_N.device)
    from_T = torch.arange(len(scene.valid_T), device=at_N.device).index_copy(0, at_N, at_N[order_N])
    return r.decided(r.weights[from_T], None if r.ids is None else r.ids[from_T])


def random(r: Routing, scene: Scene) -> Routing:
    """The token's weights on experts drawn without replacement, at every router anew; empty slots stay empty."""
    T, E = r.logits.shape
    drawn_TE = torch.rand(T, E, generator=_generator(scene.batch, scene.site)).argsort(1).to(r.logits.device)
    valid_T1 = scene.valid_T.unsqueeze(1)
    if r.ids is None:
        return r.decided(torch.where(valid_T1, r.weights.gather(1, drawn_TE), r.weights), None)
    drawn_TK = drawn_TE[:, : r.ids.shape[1]]
    return r.decided(r.weights, torch.where(valid_T1 & (r.ids >= 0), drawn_TK, r.ids))


def top_1(r: Routing, scene: Scene) -> Routing:
    """The token's total on its heaviest expert alone; the other slots are empty."""
    valid_T1, best_T1 = scene.valid_T.unsqueeze(1), r.weights.abs().argmax(1, keepdim=True)
    one_TK = torch.zeros_like(r.weights).scatter(1, best_T1, r.weights.sum(1, keepdim=True))
    weights_TK = torch.where(valid_T1, one_TK, r.weights)
    if r.ids is None:
        return r.decided(weights_TK, None)
    others_TK = torch.arange(r.ids.shape[1], device=best_T1.device) != best_T1
    return r.decided(weights_TK, r.ids.masked_fill(others_TK & valid_T1, -1))


GATES: dict[str, Edit] = {
    "uniform": uniform,
    "shuffled": shuffled,
    "random": random,
    "top-1": top_1,
    "frozen": frozen,
}
