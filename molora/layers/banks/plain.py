"""The packed experts of one linear: two parameters, and which ranks belong to which expert.

Never a list of experts: a loop that skips idle experts gives them no gradient, which trains silently wrong under
ZeRO-1/2 and fails or hangs under ZeRO-3 and DDP when ranks route differently. Packed, every step gives both
parameters a gradient, zero for the ranks of idle experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from molora.config.site import SiteConfig
from molora.errors import AdapterError
from molora.kernels.reference import Layout, gates_of

__all__ = ["ExpertBank"]


class ExpertBank(nn.Module):
    """Experts of ranks r_e side by side: ``lora_A`` (R, in_features), ``lora_B`` (out_features, R), R = sum of r_e.

    Expert e owns rows ``offset[e] : offset[e + 1]`` of A and the same columns of B; ranks may differ and may be 0.

    An expert that starts at ``B0 A0 != 0`` takes its start back under its own gate: ``g s (B A - B0 A0) x``, so that
    the mixture starts at the base whatever the gates are, and the base keeps its weights. That is the same sum over
    twice the ranks: ``frozen_A`` (R, in_features) holds A0 and ``frozen_B`` (out_features, R) holds -B0, and packed,
    expert e is [A_e; A0_e] and [B_e, -B0_e]. They are parameters, as the frozen weights of the base are: engines
    shard, cast and move them like those, and DDP leaves them alone, where it would send a buffer at every forward.
    """

    expert_R: Tensor
    scale_R: Tensor
    slot_gate_ER: Tensor
    start_E: Tensor

    def __init__(self, site: SiteConfig, *, train: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.ranks, self.scales = site.expert_ranks(), site.expert_scales()
        self.takes_back = False
        self._layout: tuple[tuple[int, ...], Layout] | None = None
        R = sum(self.ranks)
        self.lora_A = nn.Parameter(torch.empty(R, site.in_features, dtype=dtype, device=device), requires_grad=train)
        self.lora_B = nn.Parameter(torch.empty(site.out_features, R, dtype=dtype, device=device), requires_grad=train)
        if site.takes_back:
            self._add_frozen_ranks()
        self._map_ranks(device)

    def _add_frozen_ranks(self) -> None:
        self.takes_back, self._layout = True, None
        self.frozen_A = nn.Parameter(torch.zeros_like(self.lora_A), requires_grad=False)
        self.frozen_B = nn.Parameter(torch.zeros_like(self.lora_B), requires_grad=False)

    def _packed_ranks(self) -> tuple[int, ...]:
        return tuple(2 * r for r in self.ranks) if self.takes_back else self.ranks

    def _map_ranks(self, device: torch.device) -> None:
        ranks = self._packed_ranks()
        owners = [e for e, r in enumerate(ranks) for _ in range(r)]
        self.register_buffer("expert_R", torch.tensor(owners, dtype=torch.int64, device=device), persistent=False)
        scales = torch.tensor([self.scales[e] for e in owners], dtype=torch.float32, device=device)
        self.register_buffer("scale_R", scales, persistent=False)
        gates = gates_of(Layout(ranks, self.scales, self.expert_R, self.scale_R))
        self.register_buffer("slot_gate_ER", gates, persistent=False)
        starts = torch.tensor([0, *itertools.accumulate(ranks)], dtype=torch.int64, device=device)
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
        if made is None or made[0] is not self.ranks or made[1].scale_R is not buffers["scale_R"]:
            gates = self.slot_gate_ER[:-1], self.slot_gate_ER
            layout = Layout(self._packed_ranks(), self.scales, self.expert_R, self.scale_R, *gates, self.start_E)
            made = self._layout = self.ranks, layout
        return made[1]

    def packed(self) -> tuple[Tensor, Tensor, Layout]:
        """A (R, in), B (out, R) and the layout; of a bank that was offloaded, as they are while it is called.

        With frozen ranks 2 R stand side by side, expert by expert.
        """
        parameters: Any = self._parameters  # a look-up through the module costs as much as a gate of one token
        if parameters["lora_A"].is_meta:
            return cast(tuple[Tensor, Tensor, Layout], self())
        if self.takes_back:
            return self._with_frozen_ranks()
        return parameters["lora_A"], parameters["lora_B"], self.layout

    def forward(self) -> tuple[Tensor, Tensor, Layout]:
        """The same, between the hooks that bring offloaded parameters and take them away."""
        return self._with_frozen_ranks() if self.takes_back else (self.lora_A, self.lora_B, self.layout)

    def _with_frozen_ranks(self) -> tuple[Tensor, Tensor, Layout]:
        """One copy each: all experts have one rank, so they can be cut apart without an index."""
        each = (len(self.ranks), self.ranks[0])
        A_ErI = self.lora_A.unflatten(0, each), self.frozen_A.unflatten(0, each)
        B_OEr = self.lora_B.unflatten(1, each), self.frozen_B.unflatten(1, each)
        return torch.cat(A_ErI, 1).flatten(0, 1), torch.cat(B_OEr, 2).flatten(1), self.layout

    @torch.no_grad()
    def take_start_back(self) -> None:
        """Make the experts as they are now the start that their frozen ranks take back: the sum is zero from here."""
        if not self.takes_back:
            self._add_frozen_ranks()
            self._map_ranks(self.lora_A.device)
        self.frozen_A.copy_(self.lora_A)
        self.frozen_B.copy_(-self.lora_B)

    @property
    def in_pieces(self) -> bool:
        """Whether an engine shards the parameters (ZeRO-3, FSDP): they are whole only while their own linear runs."""
        A: Any = self._parameters["lora_A"]
        return type(A) is not nn.Parameter or hasattr(A, "ds_id")

    def span(self, expert: int) -> slice:
        """The ranks of ``expert``: rows of A, columns of B."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def expert(self, expert: int) -> tuple[Tensor, Tensor, float]:
        """A_e (r_e, in), B_e (out, r_e) and the scale of one expert as a LoRA; of rank 2 r_e with its frozen ranks."""
        A_rI, B_Or, *frozen = self.parts(expert)
        if frozen:
            A_rI, B_Or = torch.cat((A_rI, frozen[0])), torch.cat((B_Or, frozen[1]), 1)
        return A_rI, B_Or, self.scales[expert]

    def parts(self, expert: int) -> tuple[Tensor, ...]:
        """Views of one expert in the parameters: A_e, B_e, and where it has frozen ranks A0_e and -B0_e."""
        span = self.span(expert)
        trained = self.lora_A[span], self.lora_B[:, span]
        return (*trained, self.frozen_A[span], self.frozen_B[:, span]) if self.takes_back else trained

    @torch.no_grad()
    def set_expert(self, expert: int, A_rI: Tensor, B_Or: Tensor) -> None:
        """Copy one expert's A and B in.

        Raises:
            AdapterError: when the shapes are not those of this expert.
        """
        A, B, *_ = self.parts(expert)
        if A.shape != A_rI.shape or B.shape != B_Or.shape:
            raise AdapterError(
                f"expert {expert}: got A {tuple(A_rI.shape)} and B {tuple(B_Or.shape)}, "
                f"expected {tuple(A.shape)} and {tuple(B.shape)}"
            )
        A.copy_(A_rI)
        B.copy_(B_Or)
