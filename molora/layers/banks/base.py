"""What every bank of experts has, once: its parameters by declared dimensions, and the maps from ranks to experts.

Never a list of experts: a loop that skips idle experts gives them no gradient, which trains silently wrong under
ZeRO-1/2 and fails or hangs under ZeRO-3 and DDP when ranks route differently. Packed, every step gives all
parameters a gradient, zero for the ranks of idle experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn

from molora.config.site import SiteConfig
from molora.kernels.reference import Layout, gates_of

__all__ = ["Bank", "Packed", "RankMaps"]

Packed = tuple[Tensor, Tensor, Layout]
B = TypeVar("B", bound="Bank")
M = TypeVar("M", bound="RankMaps")


class RankMaps(nn.Module):
    """Which of the packed ranks belong to which expert, as the tensors that kernels read.

    ``sizes``: packed ranks of each expert; ``scales``: their factors. The maps are buffers that no state dict holds.
    They are made anew when the module is moved, and a cast leaves them as they are.
    """

    expert_R: Tensor
    scale_R: Tensor
    slot_gate_ER: Tensor
    start_E: Tensor

    def __init__(self, sizes: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> None:
        super().__init__()
        self.map_ranks(sizes, scales, device)

    def map_ranks(self, sizes: tuple[int, ...], scales: tuple[float, ...], device: torch.device) -> None:
        """Make the maps of experts with so many packed ranks."""
        self.sizes, self.scales, self._layout = sizes, scales, cast(Layout | None, None)
        owners = [e for e, r in enumerate(sizes) for _ in range(r)]
        self.register_buffer("expert_R", torch.tensor(owners, dtype=torch.int64, device=device), persistent=False)
        scale_R = torch.tensor([scales[e] for e in owners], dtype=torch.float32, device=device)
        self.register_buffer("scale_R", scale_R, persistent=False)
        gates = gates_of(Layout(sizes, scales, self.expert_R, self.scale_R))
        self.register_buffer("slot_gate_ER", gates, persistent=False)
        starts = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int64, device=device)
        self.register_buffer("start_E", starts, persistent=False)

    def _apply(self: M, fn: Callable[..., Any], recurse: bool = True) -> M:
        """Casts and moves as any module, but for the maps: a cast would round the scales, ``to_empty`` lose both."""
        before = self.expert_R.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.scale_R.dtype != torch.float32 or before != self.expert_R.device:
            self.map_ranks(self.sizes, self.scales, self.expert_R.device)
        return self

    @property
    def layout(self) -> Layout:
        """What the kernels need to know of the packing; made once for the same buffers."""
        made = self._layout
        if made is None or made.scale_R is not self._buffers["scale_R"]:
            gates = self.slot_gate_ER[:-1], self.slot_gate_ER
            made = self._layout = Layout(self.sizes, self.scales, self.expert_R, self.scale_R, *gates, self.start_E)
        return made


class Bank(RankMaps):
    """The experts of one linear, of ranks r_e: what an entry of ``BANKS`` is derived from.

    An entry declares its parameters by their dimensions in ``dims``, in the letters of ``molora/routing.py``: ``R`` the
    ranks of all experts side by side, ``I`` in_features, ``O`` out_features, ``E`` experts. Of a parameter with R,
    expert e owns its ranks; of one with E, its index; a parameter with neither is shared by all. From that follow
    shapes, adapter files, plans, views of one expert, :meth:`resized`. Its duties beside it: :meth:`pack`,
    :meth:`reset_parameters`, :meth:`set_expert`, and what of the class attributes and methods below is not so for it.

    Values that do not train are parameters, not buffers: engines shard, cast and move them like the frozen weights of
    the base, and DDP leaves them alone, where it would send a buffer at every forward.

    Attributes:
        dims: dimensions of each parameter by its name.
        output: names of the parameters with which, all at 0, an expert computes 0. They are also those that do not
            train where a start freezes B.
        frozen: names of the parameters that never train.
        words: what a parameter holds, for plans and model cards; its name where it is left out.
        for_stacked: whether stacked experts of a base may use it, whose weights take ``s B A`` themselves.
    """

    dims: ClassVar[Mapping[str, str]] = {}
    output: ClassVar[tuple[str, ...]] = ()
    frozen: ClassVar[tuple[str, ...]] = ()
    words: ClassVar[Mapping[str, str]] = {}
    for_stacked: ClassVar[bool] = True

    # What a site alone tells

    @classmethod
    def shapes(cls, site: SiteConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the parameters on ``site``."""
        sizes = {"R": site.total_rank(), "I": site.in_features, "O": site.out_features, "E": site.num_experts}
        return {name: tuple(sizes[d] for d in dims) for name, dims in cls.dims.items()}

    @classmethod
    def trained(cls, site: SiteConfig, train: bool, train_B: bool = True) -> set[str]:
        """Names of the parameters that train; ``train``, ``train_B``: whether the placement trains experts, and B."""
        still = {*cls.frozen, *(() if train_B else cls.output)}
        return {name for name in cls.shapes(site) if name not in still} if train else set()

    @classmethod
    def packed_ranks(cls, site: SiteConfig) -> tuple[int, ...]:
        """How many ranks each expert has in the product."""
        return site.expert_ranks()

    @classmethod
    def copied(cls, site: SiteConfig) -> int:
        """How many elements :meth:`pack` makes anew: all of A and B, if the entry does not know better."""
        return sum(cls.packed_ranks(site)) * (site.in_features + site.out_features)

    @classmethod
    def faults(cls, site: SiteConfig) -> list[str]:
        """Why the experts of ``site`` cannot be of this kind, in words."""
        return []

    @classmethod
    def tiny(cls) -> dict[str, Any]:
        """Options of a smallest :class:`molora.config.Placement` that uses it, beside ``bank`` itself."""
        return {"num_experts": 3, "r": 2, "lora_alpha": 4.0}

    # The duties

    def pack(self) -> tuple[Tensor, Tensor]:
        """A (R', in) and B (out, R') of all experts, expert by expert, R' the sum of :meth:`packed_ranks`."""
        raise NotImplementedError(f"{type(self).__name__}.pack")

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Set the parameters that no initialiser sets, drawn from ``generator`` alone: all but ``lora_A, lora_B``.

        A bank without these two sets all of its own, so that the output is zero, and takes no other start.
        """

    def set_expert(self, expert: int, A_rI: Tensor, B_Or: Tensor) -> None:
        """Make one expert the LoRA ``B A`` of its rank.

        Raises:
            AdapterError: when the shapes are not those of this expert, or it cannot be that LoRA.
        """
        raise NotImplementedError(f"{type(self).__name__}.set_expert")

    # What all have

    def __init__(
        self, site: SiteConfig, *, train: bool, train_B: bool = True, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(self.packed_ranks(site), site.expert_scales(), device)
        self.ranks = site.expert_ranks()
        shapes, learned = self.shapes(site), self.trained(site, train, train_B)
        self.first = next(iter(shapes))
        for name, shape in shapes.items():
            values = torch.empty(shape, dtype=dtype, device=device)
            self.register_parameter(name, nn.Parameter(values, requires_grad=name in learned))

    def packed(self) -> Packed:
        """A (R', in), B (out, R') and the layout; of a bank that was offloaded, as they are while it is called."""
        parameters: Any = self._parameters  # a look-up through the module costs as much as a gate of one token
        if parameters[self.first].is_meta:
            return cast(Packed, self())
        return (*self.pack(), self.layout)

    def forward(self) -> Packed:
        """The same, between the hooks that bring offloaded parameters and take them away."""
        return (*self.pack(), self.layout)

    @property
    def in_pieces(self) -> bool:
        """Whether an engine shards the parameters (ZeRO-3, FSDP): they are whole only while their own linear runs."""
        first: Any = self._parameters[self.first]
        return type(first) is not nn.Parameter or hasattr(first, "ds_id")

    @property
    def is_meta(self) -> bool:
        """Whether the parameters have no storage: on the meta device, or offloaded."""
        first: Any = self._parameters[self.first]
        return bool(first.is_meta)

    def span(self, expert: int) -> slice:
        """The ranks of ``expert`` in a parameter's dimension R."""
        start = sum(self.ranks[:expert])
        return slice(start, start + self.ranks[expert])

    def views(self, expert: int) -> dict[str, Tensor]:
        """What one expert owns of each parameter, by name; parameters that all share are left out."""
        own = {"R": self.span(expert), "E": slice(expert, expert + 1)}
        return {
            name: getattr(self, name)[tuple(own.get(d, slice(None)) for d in dims)]
            for name, dims in self.dims.items()
            if not own.keys().isdisjoint(dims)
        }

    def expert(self, expert: int) -> tuple[Tensor, Tensor, float]:
        """A_e (r, in), B_e (out, r) and the scale of one expert as it is computed: ``s_e B_e A_e``."""
        A_RI, B_OR, layout = self.packed()
        start = sum(layout.ranks[:expert])
        own = slice(start, start + layout.ranks[expert])
        return A_RI[own], B_OR[:, own], self.scales[expert]

    def as_lora(self, expert: int) -> tuple[Tensor, Tensor, float]:
        """One expert as a plain LoRA (A, B, scale), exactly: what exports, merges and PEFT take.

        Raises:
            ConfigError: by an entry whose expert is no LoRA, with the reason.
        """
        return self.expert(expert)

    @torch.no_grad()
    def silence(self, expert: int) -> None:
        """Make one expert compute zero; it can be trained from there."""
        for name, view in self.views(expert).items():
            if name in self.output:
                view.zero_()

    @torch.no_grad()
    def resized(self: B, site: SiteConfig, sources: Sequence[int | None], start: Callable[[B], None]) -> B:
        """A bank of this class for ``site``, whose experts are these by index, bit for bit, or new ones (None).

        A new expert is as ``start`` leaves the new bank, but computes zero.
        """
        first = cast(Tensor, self._parameters[self.first])
        new = type(self)(site, train=False, dtype=first.dtype, device=torch.device("cpu"))
        start(new)
        for name, dims in self.dims.items():
            old, own = getattr(self, name), getattr(new, name)
            own.requires_grad_(old.requires_grad)
            if not {"R", "E"} & set(dims):
                own.copy_(old)
        for e, source in enumerate(sources):
            if source is None:
                new.silence(e)
                continue
            given = self.views(source)
            for name, view in new.views(e).items():
                view.copy_(given[name])
        return new.to(first.device)
