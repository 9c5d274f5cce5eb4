"""Which kernel computes the sums: one table, and a deterministic choice by shapes, dtype and device with its reason."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from molora.errors import ConfigError, nearest
from molora.kernels import functional, reference
from molora.kernels.configs import MAX_RANK
from molora.kernels.reference import Layout
from molora.routing import Routing

__all__ = ["KERNELS", "Call", "Choice", "Kernel", "choose", "contract_slots", "expand_slots", "known"]
__all__ += ["mix_linear"]


HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Call(NamedTuple):
    """What a choice depends on: total rank, device and dtype of x; never its values."""

    total_rank: int
    device_type: str
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor, total_rank: int) -> Call:
        """The call that multiplies ``x`` with ``total_rank`` ranks; the dtype is autocast's where that is on."""
        lowers = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if lowers else x.dtype
        return cls(total_rank, x.device.type, dtype)


class Choice(NamedTuple):
    """The name of a kernel and why it was taken."""

    name: str
    reason: str


class Kernel(NamedTuple):
    """One way to compute each sum; all have one meaning, that of :func:`molora.kernels.reference.rank_mix_loop`.

    ``mix(base, x, A, B, routing, layout)``; ``expand(base, x, A, B, routing, layout)``;
    ``contract(h, A, B, routing, layout)``; ``linear(x, W, bias, A, B, routing, layout)`` for a frozen ``nn.Linear``,
    or None where the base is always called first; ``refuses(call)``: why it cannot run, or None.
    """

    mix: Callable[..., Tensor]
    expand: Callable[..., Tensor]
    contract: Callable[..., Tensor]
    linear: Callable[..., Tensor] | None
    refuses: Callable[[Call], str | None]


def _cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t if t.dtype == dtype else t.to(dtype)  # a call that changes nothing still costs a microsecond a parameter


def _dense(routing: Routing | None) -> Tensor | None:
    return None if routing is None else routing.dense()


def _concat(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout) -> Tensor:
    return reference.rank_mix_concat(base, x, _cast(A, x.dtype), _cast(B, x.dtype), _dense(routing), layout)


def _loop(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing | None, layout: Layout) -> Tensor:
    return reference.rank_mix_loop(base, x, _cast(A, x.dtype), _cast(B, x.dtype), _dense(routing), layout)


def _expand(base: Tensor, x: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    return reference.expand_slots(base, x, _cast(A, x.dtype), _cast(B, x.dtype), routing.slots(), layout)


def _contract(h: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    weights_TK = _cast(routing.weights, h.dtype)
    return reference.contract_slots(h, weights_TK, _cast(A, h.dtype), _cast(B, h.dtype), routing.slots(), layout)


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


def _triton_contract(h: Tensor, A: Tensor, B: Tensor, routing: Routing, layout: Layout) -> Tensor:
    maps = {"expert_R": layout.expert_R, "scale_R": layout.scale_R}
    return functional.contract_slots(h, routing.weights, A, B, routing.slot_ids(), **maps)


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


KERNELS: dict[str, Kernel] = {
    "concat": Kernel(_concat, _expand, _contract, None, _never),
    "loop": Kernel(_loop, _expand, _contract, None, _never),
    "triton": Kernel(_triton_mix, _triton_expand, _triton_contract, _triton_linear, _triton_refuses),
}


def choose(kernel: str, call: Call) -> Choice:
    """Pick a kernel for ``call``; ``kernel`` other than ``"auto"`` is obeyed.

    Raises:
        ConfigError: for a name that is not in ``KERNELS``, or a kernel asked for that cannot run here.
    """
    if kernel == "auto":
        if call.device_type != "cuda":
            return Choice("concat", f"the tensors are on {call.device_type}")
        if refusal := _triton_refuses(call):
            return Choice("concat", refusal)
        return Choice("triton", f"CUDA tensors of {call.dtype}, {call.total_rank} ranks side by side")
    known(kernel)
    if refusal := KERNELS[kernel].refuses(call):
        raise ConfigError(f"kernel: got {kernel!r}, but {refusal}; take kernel='auto'")
    return Choice(kernel, "asked for by kernel=")


def known(kernel: str) -> None:
    """Refuse a name that is neither ``"auto"`` nor in the table.

    Raises:
        ConfigError: with the nearest name.
    """
    if kernel != "auto" and kernel not in KERNELS:
        raise ConfigError(
            f"kernel: got {kernel!r}, expected 'auto' or one of {', '.join(KERNELS)}{nearest(kernel, KERNELS)}"
        )


def _chosen(kernel: str, x: Tensor, total_rank: int) -> Kernel:
    return KERNELS[choose(kernel, Call.of(x, total_rank)).name]


def mix_linear(
    kernel: str,
    layer: nn.Module,
    base: Callable[[], Tensor],
    x_TI: Tensor,
    dropped_TI: Tensor,
    experts: tuple[Tensor, Tensor, Routing | None, Layout],
) -> Tensor:
    """``layer(x) + ((dropped A^T) * g) B^T`` (T, O) by the chosen kernel; without a routing every expert counts 1.

    ``experts``: A (R, I), B (O, R), the routing, the layout; A and B may be of another dtype than x, which is that of
    the products. A kernel that does base and experts in one operator is taken where ``layer`` is exactly a frozen
    ``nn.Linear`` that nobody hooks into (not quantised, sharded, or gathered on use) and the experts see the same x;
    otherwise ``base()`` is called for the layer's output.
    """
    chosen = _chosen(kernel, dropped_TI, experts[0].shape[0])
    if chosen.linear is not None and dropped_TI is x_TI and _plain(layer, x_TI):
        return chosen.linear(x_TI, layer.weight, layer.bias, *experts)
    y = base()
    return chosen.mix(y.reshape(-1, y.shape[-1]), dropped_TI, *experts)


def _plain(layer: nn.Module, x: Tensor) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) is not nn.Linear or hooked or "forward" in vars(layer):
        return False
    frozen = not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
    whole = type(layer.weight) in (nn.Parameter, Tensor) and layer.weight.shape == (layer.out_features, x.shape[-1])
    return frozen and whole and layer.weight.dtype == x.dtype


def expand_slots(
    kernel: str, base_TF: Tensor, x_TD: Tensor, A_RD: Tensor, B_FR: Tensor, routing: Routing, layout: Layout
) -> Tensor:
    """``y[t, k] = base[t] + s B_e A_e x[t]`` with e the expert of slot k: (T, K, F)."""
    return _chosen(kernel, x_TD, A_RD.shape[0]).expand(base_TF, x_TD, A_RD, B_FR, routing, layout)


def contract_slots(kernel: str, h_TKF: Tensor, A_RF: Tensor, B_DR: Tensor, routing: Routing, layout: Layout) -> Tensor:
    """``sum_k w[t, k] s B_e A_e h[t, k]``: (T, D)."""
    return _chosen(kernel, h_TKF, A_RF.shape[0]).contract(h_TKF, A_RF, B_DR, routing, layout)
