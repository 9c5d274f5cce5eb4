"""The packed experts of one linear: two parameters, and which ranks belong to which expert.

Never a list of experts: a loop that skips idle experts gives them no gradient, which trains silently wrong under
ZeRO-1/2 and fails or hangs under ZeRO-3 and DDP when ranks route differently. Packed, every step gives both
parameters a gradient, zero for the ranks of idle experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from molora.errors import AdapterError
from molora.kernels.reference import Layout, gates_of
from molora.site import SiteConfig

__all__ = ["ExpertBank"]


class ExpertBank(nn.Module):
    """Experts of ranks r_e side by side: ``lora_A`` (R, in_features), ``lora_B`` (out_features, R), R = sum of r_e.

    Expert e owns rows ``offset[e] : offset[e + 1]`` of A and the same columns of B; ranks may differ and may be 0.
    """

    expert_R: Tensor
    scale_R: Tensor
    slot_gate_ER: Tensor
    start_E: Tensor

    def __init__(self, site: SiteConfig, *, train: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ranks, self.scales = site.expert_ranks(), site.expert_scales()
        self._layout: Layout | None = None
        R = sum(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(R, site.in_features, dtype=dtype, device=device), requires_grad=train)
        self.lora_B = nn.Parameter(torch.empty(site.out_features, R, dtype=dtype, device=device), requires_grad=train)
        self._map_ranks(device)

    def _map_ranks(self, device: torch.device) -> None:
        owners = [e for e, r in enumerate(self.ranks) for _ in range(r)]
        self.register_buffer("expert_R", torch.tensor(owners, dtype=torch.int64, device=device), persistent=False)
        scales = torch.tensor([self.scales[e] for e in owners], dtype=torch.float32, device=device)
        self.register_buffer("scale_R", scales, persistent=False)
        gates = gates_of(Layout(self.ranks, self.scales, self.expert_R, self.scale_R))
        self.register_buffer("slot_gate_ER", gates, persistent=False)
        starts = torch.tensor([0, *itertools.accumulate(self.ranks)], dtype=torch.int64, device=device)
        self.register_buffer("start_E", starts, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ExpertBank:
        """Casts and moves as any module, but for the maps: a cast would round the scales, ``to_empty`` lose both."""
        before = self.expert_R.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale_R.dtype != torch.float32 or before != self.expert_R.device:
            self._map_ranks(self.expert_R.device)
        return self

    @property
    def layout(self) -> Layout:
        """What the kernels need to know of the packing; made once for the same buffers."""
        buffers, made = self._buffers, self._layout
        if made is None or made.ranks is not self.ranks or made.scale_R is not buffers["scale_R"]:
            gates = self.slot_gate_ER[:-1], self.slot_gate_ER
            made = Layout(self.ranks, self.scales, self.expert_R, self.scale_R, *gates, self.start_E)
            self._layout = made
        return made

    def packed(self) -> tuple[Tensor, Tensor, Layout]:
        """A (R, in), B (out, R) and the layout; of a bank that was offloaded, as they are while it is called."""
        parameters: Any = self._parameters  # a look-up through the module costs as much as a gate of one token
        if parameters["lora_A"].is_meta:
            return cast(tuple[Tensor, Tensor, Layout], self())
        return parameters["lora_A"], parameters["lora_B"], self.layout

    def forward(self) -> tuple[Tensor, Tensor, Layout]:
        """The same, between the hooks that bring offloaded parameters and take them away."""
        return self.lora_A, self.lora_B, self.layout

    @property
    def in_pieces(self) -> bool:
        """Whether an engine shards the parameters (ZeRO-3, FSDP): they are whole only while their own linear runs."""
        A: Any = self._parameters["lora_A"]
        return type(A) is not nn.Parameter or hasattr(A, "ds_id")

    def reset_parameters(self, generator: torch.Generator, init: str) -> None:
        """Draw A, and B for ``init="random"`` (else zero), from ``generator`` alone.

        ``kaiming``: A uniform in +-1/sqrt(in_features), as PEFT; ``gaussian``: A normal with std 1/r of its expert.
        """
        bound = 1 / math.sqrt(max(self.lora_A.shape[1], 1))
        with torch.no_grad():
            if init == "gaussian":
                self.lora_A.normal_(0.0, 1.0, generator=generator)
                rank_R = torch.tensor(self.ranks, device=self.lora_A.device)[self.expert_R]
                self.lora_A.div_(rank_R.unsqueeze(-1))
            else:
                self.lora_A.uniform_(-bound, bound, generator=generator)
            if init == "random":
                width = 1 / math.sqrt(max(max(self.ranks, default=1), 1))
                self.lora_B.uniform_(-width, width, generator=generator)
            else:
                self.lora_B.zero_()

    def span(self, expert: int) -> slice:
        """The ranks of ``expert``: rows of A, columns of B."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def expert(self, expert: int) -> tuple[Tensor, Tensor, float]:
        """Views A_e (r_e, in), B_e (out, r_e) and the scale of one expert."""
        span = self.span(expert)
        return self.lora_A[span], self.lora_B[:, span], self.scales[expert]

    @torch.no_grad()
    def set_expert(self, expert: int, A_rI: Tensor, B_Or: Tensor) -> None:
        """Copy one expert in.

        Raises:
            AdapterError: when the shapes are not those of this expert.
        """
        A, B, _ = self.expert(expert)
        if A.shape != A_rI.shape or B.shape != B_Or.shape:
            raise AdapterError(
                f"expert {expert}: got A {tuple(A_rI.shape)} and B {tuple(B_Or.shape)}, "
                f"expected {tuple(A.shape)} and {tuple(B.shape)}"
            )
        A.copy_(A_rI)
        B.copy_(B_Or)
