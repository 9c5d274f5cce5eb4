"""Which kernel computes the sums: one table, and a deterministic choice by shapes, dtype and device with its reason."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from molora.errors import ConfigError, nearest
from molora.kernels import functional, reference
from molora.kernels.glu.ops import MAX_GLU_RANK
from molora.kernels.rank.ops import INTERPRETED
from molora.kernels.reference import Half, Layout
from molora.kernels.sorted import ops as grouped_ops
from molora.kernels.tiles import MAX_RANK, RIDGE
from molora.routing import Routing, as_dtype, autocast_on

__all__ = ["KERNELS", "Call", "Choice", "Kernel", "add_ranks", "choose", "contract_slots", "expand_slots", "known"]
__all__ += ["Unit", "for_every_token", "mix_linear", "unit_for"]

HAS_TRITON = importlib.util.find_spec("triton") is not None


class Call(NamedTuple):
    """What a choice depends on: sizes, device, dtype, and whether gradients are recorded; never values.

    ``choices``: experts chosen per token, 0 where every expert has a weight or counts 1. ``max_rank``: the largest rank
    of an expert.
    """

    total_rank: int
    device_type: str
    dtype: torch.dtype
    experts: int = 1
    choices: int = 0
    max_rank: int = 1
    tokens: int = 1 << 20
    grad: bool = True

    @classmethod
    def of(cls, x: Tensor, routing: Routing | None, layout: Layout) -> Call:
        """The call that sends ``x`` through a bank; the dtype is autocast's where that is on."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if autocast_on(x) else x.dtype
        choices = 0 if routing is None or routing.ids is None else routing.ids.shape[1]
        sizes = (len(layout.ranks), choices, max(layout.ranks, default=0), x.shape[0])
        return cls(layout.expert_R.shape[0], device, dtype, *sizes, torch.is_grad_enabled())


class Choice(NamedTuple):
    """The name of a kernel and why it was taken."""

    name: str
    reason: str


class Kernel(NamedTuple):
    """One way to compute each sum; all have one meaning, that of :func:`molora.kernels.reference.rank_mix_loop`.

    ``mix(base, x, A, B, routing, layout)``. ``expand(base, x, A, B, routing, layout)`` and ``contract(base, h, A, B,
    routing, layout, overwrite)``, which may write into the base where ``overwrite`` says so; None for both where the
    kernel is for linears only, and the blocks take the one of ``"auto"``.
    ``linear(x, W, bias, A, B, routing, layout)`` for a frozen ``nn.Linear``, or None where the
    base is always called first. ``refuses(call)``: why it cannot run, or None.
    ``unit(halves, A, layout, routing, act)``: the middle of a gated unit at once, as
    :func:`molora.kernels.reference.mix_glu`; where it is None, or ``takes_units(x, layout)`` is false, the block
    keeps its slot axis.
    """

    mix: Callable[..., Tensor]
    expand: Callable[..., Tensor] | None
    contract: Callable[..., Tensor] | None
    linear: Callable[..., Tensor] | None
    refuses: Callable[[Call], str | None]
    unit: Callable[..., tuple[Tensor, Tensor | None]] | None = None
    takes_units: Callable[[Tensor, Layout], bool] = lambda x, layout: True


def _dense(routing: Routing | None) -> Tensor | None:
    if routing is None:
        return None
    return routing.weights if routing.ids is None else routing.dense()


def _concat(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout) -> Tensor:
    return reference.rank_mix_concat(base, x, as_dtype(A, x.dtype), as_dtype(B, x.dtype), _dense(routing), layout)


def _loop(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout) -> Tensor:
    return reference.rank_mix_loop(base, x, as_dtype(A, x.dtype), as_dtype(B, x.dtype), _dense(routing), layout)


def _expand(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    slots = routing.slot_rows(), routing.weights.shape[1]
    return reference.expand_slots(base, x, as_dtype(A, x.dtype), as_dtype(B, x.dtype), *slots, layout)


def _concat_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout
) -> Tensor:
    base, A, B = nn.functional.linear(x, W, bias), as_dtype(A, x.dtype), as_dtype(B, x.dtype)
    return reference.rank_mix_concat(base, x, A, B, _dense(routing), layout, overwrite=True)


def _contract(
    base: Tensor, h: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout, overwrite: bool
) -> Tensor:
    experts = routing.weights, as_dtype(A, h.dtype), as_dtype(B, h.dtype), routing.slot_rows(), layout
    return reference.contract_slots(base, h, *experts, overwrite=overwrite and not base.requires_grad)


def _triton_mix(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout) -> Tensor:
    weights, ids = (None, None) if routing is None else (routing.weights, routing.ids)
    return functional.rank_mix(base, x, A, B, weights, ids, expert_R=layout.expert_R, scale_R=layout.scale_R)


def _triton_linear(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout
) -> Tensor:
    weights, ids = (None, None) if routing is None else (routing.weights, routing.ids)
    maps = {"expert_R": layout.expert_R, "scale_R": layout.scale_R}
    return functional.rank_mix_linear(x, W, bias, A, B, weights, ids, **maps)


def _triton_expand(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    maps = {"expert_R": layout.expert_R, "scale_R": layout.scale_R}
    return functional.expand_slots(base, x, A, B, routing.slot_ids(), **maps)


def _triton_contract(
    base: Tensor, h: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout, overwrite: bool
) -> Tensor:
    maps = {"expert_R": layout.expert_R, "scale_R": layout.scale_R}
    return functional.contract_slots(base, h, routing.weights, A, B, routing.slot_ids(), **maps)


def _triton_unit(
    halves: tuple[Half, Half], A: Tensor | None, layout: Layout | None, routing: Routing, act: str
) -> tuple[Tensor, Tensor | None]:
    u, v = halves
    some = next((x for x in (u.layout, v.layout, layout) if x is not None), None)
    if some is None:
        some = Layout((), (), routing.slot_ids().new_empty(0), routing.weights.new_empty(0))
    scales = [some.scale_R if x is None else x.scale_R for x in (u.layout, v.layout, layout)]
    products = u.base_TF, v.base_TF, u.h_TR, v.h_TR, u.B_FR, v.B_FR, A
    who = routing.weights, routing.slot_ids(), some.expert_R, scales[0], scales[1], scales[2], routing.num_experts
    hbar_TF, h_TR = functional.mix_glu(*products, *who, act)
    return hbar_TF, None if A is None else h_TR


def _concat_unit(
    halves: tuple[Half, Half], A: Tensor | None, layout: Layout | None, routing: Routing, act: str
) -> tuple[Tensor, Tensor | None]:
    return reference.mix_glu(*halves, A, layout, routing.weights, routing.slot_rows(), act)


def _without_gradients(x: Tensor, layout: Layout) -> bool:
    return not torch.is_grad_enabled()


def _in_one_program(x: Tensor, layout: Layout) -> bool:
    return layout.expert_R.shape[0] <= MAX_GLU_RANK


def _groups(routing: Routing, layout: Layout) -> dict[str, Any]:
    start_E = layout.start_E
    if start_E is None:
        start_E = torch.tensor([0, *itertools.accumulate(layout.ranks)], device=layout.expert_R.device)
    return {"start_E": start_E, "scale_R": layout.scale_R, "max_rank": max(layout.ranks)}


def _sorted_mix(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    return grouped_ops.sorted_mix(base, x, A, B, routing.weights, routing.slot_ids(), **_groups(routing, layout))


def _gather_mix(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    return grouped_ops.gather_mix(base, x, A, B, routing.weights, routing.slot_ids(), **_groups(routing, layout))


def _never(call: Call) -> str | None:
    return None


def _triton_refuses(call: Call) -> str | None:
    if not HAS_TRITON:
        return "triton is not installed (pip install 'molora[triton]')"
    if call.device_type != "cuda" and not INTERPRETED:
        return f"Triton kernels need a CUDA device, the tensors are on {call.device_type}"
    if call.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the Triton kernels take float32, bfloat16 and float16, not {call.dtype}"
    if call.total_rank > MAX_RANK:
        return f"{call.total_rank} ranks side by side are more than the {MAX_RANK} of the Triton kernels"
    return None


def _sorted_refuses(call: Call) -> str | None:
    if not call.choices:
        return "sorting needs a choice of experts, and here every expert counts"
    if call.max_rank > grouped_ops.MAX_EXPERT_RANK:
        return (
            f"an expert of {call.max_rank} ranks is larger than the {grouped_ops.MAX_EXPERT_RANK} of the sorted kernels"
        )
    return _triton_refuses(call._replace(total_rank=1)) if call.device_type == "cuda" else None


def _gather_refuses(call: Call) -> str | None:
    if call.grad:
        return "gathering rows of experts is for inference under torch.no_grad()"
    return _sorted_refuses(call._replace(max_rank=1))


KERNELS: dict[str, Kernel] = {
    "torch": Kernel(*(_concat, _expand, _contract, _concat_linear, _never), _concat_unit, _without_gradients),
    "loop": Kernel(_loop, _expand, _contract, None, _never),
    "triton": Kernel(
        *(_triton_mix, _triton_expand, _triton_contract, _triton_linear, _triton_refuses),
        *(_triton_unit, _in_one_program),
    ),
    "sorted": Kernel(_sorted_mix, None, None, None, _sorted_refuses),
    "gather": Kernel(_gather_mix, None, None, None, _gather_refuses),
}


FORMER_NAMES = {"concat": "torch"}  # as folders and programs of the first edition say


def choose(kernel: str, call: Call) -> Choice:
    """Pick a kernel for ``call``; ``kernel`` other than ``"auto"`` is obeyed.

    Raises:
        ConfigError: for a name that is not in ``KERNELS``, or a kernel asked for that cannot run here.
    """
    if kernel == "auto":
        return _automatic(call)
    known(kernel)
    kernel = FORMER_NAMES.get(kernel, kernel)
    if refusal := KERNELS[kernel].refuses(call):
        raise ConfigError(f"kernel: got {kernel!r}, but {refusal}; take kernel='auto'")
    return Choice(kernel, "asked for by kernel=")


def _automatic(call: Call) -> Choice:
    if call.device_type != "cuda":
        return Choice("torch", f"the tensors are on {call.device_type}")
    side = f"{call.total_rank} ranks side by side"
    if 4 * call.tokens * call.choices < call.experts and not _gather_refuses(call):
        return Choice("gather", f"{call.tokens} tokens choose {call.choices} of {call.experts} experts")
    if call.total_rank > 2 * call.choices * RIDGE and not _sorted_refuses(call):
        return Choice("sorted", f"{side} cost more than {call.choices} passes over sorted tokens")
    if refusal := _triton_refuses(call):
        return Choice("torch", refusal)
    return Choice("triton", f"CUDA tensors of {call.dtype}, {side}")


def known(kernel: str) -> None:
    """Refuse a name that is neither ``"auto"`` nor in the table.

    Raises:
        ConfigError: with the nearest name.
    """
    if kernel != "auto" and kernel not in KERNELS and kernel not in FORMER_NAMES:
        raise ConfigError(
            f"kernel: got {kernel!r}, expected 'auto' or one of {', '.join(KERNELS)}{nearest(kernel, KERNELS)}"
        )


def _chosen(kernel: str, x: Tensor, routing: Routing | None, layout: Layout) -> Kernel:
    if kernel == "auto" and x.is_cpu:  # as choose() says; asking it costs more than a gate of one token
        return KERNELS["torch"]
    return KERNELS[choose(kernel, Call.of(x, routing, layout)).name]


def mix_linear(
    kernel: str,
    layer: nn.Module,
    base: Callable[[], Tensor],
    x_TI: Tensor,
    dropped_TI: Tensor,
    experts: tuple[Tensor, Tensor, Routing | None, Layout],
    read: bool = True,
) -> Tensor:
    """``layer(x) + ((dropped A^T) * g) B^T`` (T, O) by the chosen kernel; without a routing every expert counts 1.

    ``experts``: A (R, I), B (O, R), the routing, the layout; A and B may be of another dtype than x, which is that of
    the products. A kernel that does base and experts in one operator is taken where ``layer`` is exactly a frozen
    ``nn.Linear`` that nobody hooks into (not quantised, sharded, or gathered on use) and the experts see the same x;
    otherwise, and without ``read``, ``base()`` is called for the layer's output.
    """
    chosen = _chosen(kernel, dropped_TI, *experts[2:])
    if chosen.linear is not None and read and dropped_TI is x_TI and _plain(layer, x_TI):
        parameters = layer._parameters
        return chosen.linear(x_TI, parameters["weight"], parameters["bias"], *experts)
    y = base()
    return chosen.mix(y.reshape(-1, y.shape[-1]), dropped_TI, *experts)


def _plain(layer: nn.Module, x: Tensor) -> bool:
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
        return False
    if _has_any_global_hook():  # somebody follows every module, as FlopCounterMode does
        return False
    parameters = layer._parameters  # a look-up of each through the module costs as much as a gate of one token
    weight, bias = parameters.get("weight"), parameters.get("bias")
    if weight is None or type(weight) not in _WHOLE or weight.requires_grad or weight.dtype != x.dtype:
        return False
    if weight.shape != (layer.out_features, x.shape[-1]) or (bias is not None and bias.requires_grad):
        return False
    return not autocast_on(x)  # which keeps the weight that it cast; here each call would


_WHOLE = (nn.Parameter, Tensor)  # neither quantised nor sharded


def expand_slots(
    kernel: str, base_TF: Tensor, x_TD: Tensor, A_RD: Tensor, B_FR: Tensor, routing: Routing, layout: Layout
) -> Tensor:
    """``y[t, k] = base[t] + s B_e A_e x[t]`` with e the expert of slot k: (T, K, F)."""
    expand = _for_slots(kernel, x_TD, layout).expand
    assert expand is not None
    return expand(base_TF, x_TD, A_RD, B_FR, routing, layout)


def contract_slots(
    kernel: str,
    layer: nn.Module,
    base_TD: Tensor,
    h_TKF: Tensor,
    experts: tuple[Tensor, Tensor, Routing, Layout],
) -> Tensor:
    """``base[t] + sum_k w[t, k] s B_e A_e h[t, k]``: (T, D); ``base_TD`` is what ``layer`` returned for this call.

    ``experts``: A (R, F), B (D, R), the routing, the layout.
    """
    contract = _for_slots(kernel, h_TKF, experts[-1]).contract
    assert contract is not None
    return contract(base_TD, h_TKF, *experts, _plain(layer, h_TKF))


class Unit(NamedTuple):
    """The middle of a gated unit that is computed at once: by which function, and what its linears left so far."""

    run: Callable[..., tuple[Tensor, Tensor | None]]
    halves: list[Half]

    def add(self, base_TF: Tensor, gated: bool, x_TD: Tensor, bank: tuple[Tensor, Tensor, Layout] | None) -> None:
        """Leave an up-side linear's frozen product and its experts' factors; ``bank``: A (R, D), B (F, R), layout."""
        if bank is None:
            self.halves.append(Half(base_TF, gated))
            return
        A_RD, B_FR, layout = bank
        h_TR = as_dtype(nn.functional.linear(x_TD, as_dtype(A_RD, x_TD.dtype)), base_TF.dtype)
        self.halves.append(Half(base_TF, gated, h_TR, as_dtype(B_FR, base_TF.dtype), layout))

    def mix(
        self, A_RF: Tensor | None, layout: Layout | None, routing: Routing, act: str
    ) -> tuple[Tensor, Tensor | None]:
        """``sum_k w_k h_k`` (T, F) and the down experts' ``sum_k w_k s M_k (h_k A^T)`` (T, R)."""
        u, v = sorted(self.halves, key=lambda h: not h.gated)
        return self.run((u, v), A_RF, layout, routing, act)


def unit_for(kernel: str, x_TD: Tensor, layout: Layout) -> Unit | None:
    """A unit to fill, where the chosen kernel computes the middle of a gated unit at once for tokens as ``x_TD``."""
    chosen = _for_slots(kernel, x_TD, layout)
    if chosen.unit is None or not chosen.takes_units(x_TD, layout):
        return None
    return Unit(chosen.unit, [])


def add_ranks(layer: nn.Module, x_TF: Tensor, base_TD: Tensor, h_TR: Tensor, B_DR: Tensor) -> Tensor:
    """``base + h B^T`` (T, D); ``base_TD`` is what ``layer`` returned for ``x``."""
    overwrite = not base_TD.requires_grad and _plain(layer, x_TF)
    return reference.add_product(base_TD, h_TR, as_dtype(B_DR, h_TR.dtype), overwrite=overwrite)


def _for_slots(kernel: str, x: Tensor, layout: Layout) -> Kernel:
    """As if every expert counted: slots are made for each token, whatever was chosen for it."""
    return _chosen(for_every_token(kernel), x, None, layout)


def for_every_token(kernel: str) -> str:
    """The same kernel where every expert counts for every token; ``"auto"`` for one that sorts tokens by choices."""
    return "auto" if kernel in KERNELS and KERNELS[kernel].expand is None else kernel
