"""One shape-only forward of a model, recorded operation by operation.

A copy of the model without storage runs on the meta device, its linears replaced by stand-ins that only make shapes.
No real weight is read, so meta, partitioned and very large models work; no class or module name is looked at.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

__all__ = ["Call", "Trace", "linear_shape", "trace"]

ENCODER_TOKENS, DECODER_TOKENS = 7, 3  # unequal, so that a site's token count names its stream


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of anything that maps the last dimension, or None. Never reads a weight."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        widths = tuple(getattr(module, n, None) for n in names)
        if all(isinstance(w, int) for w in widths):
            return widths  # type: ignore[return-value]
    return None


@dataclass
class Call:
    """One run of a linear: its path, the tensor it read and the tensor it made."""

    path: str
    x: Tensor
    out: Tensor
    op: int


@dataclass
class Trace:
    """The recorded forward: operations in order, and the calls of linears among them."""

    ops: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], list[Tensor]]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    linears: list[_Shape] = field(default_factory=list)
    stacks: dict[str, Tensor] = field(default_factory=dict)
    spans: dict[str, list[range]] = field(default_factory=dict)

    def read(self) -> set[str]:
        """Paths of linears whose weight went into an operation of the model's own, past their forward."""
        weights = {id(m.weight): m.path for m in self.linears}
        used = (id(t) for _, args, kwargs, _ in self.ops for t in tree_flatten((args, kwargs))[0])
        return {weights[i] for i in used if i in weights}

    def read_past(self) -> set[str]:
        """Paths of parameters of three dimensions that were read while their own module was not being called."""
        paths = {id(p): path for path, p in self.stacks.items()}
        used = ((i, id(t)) for i, op in enumerate(self.ops) for t in tree_flatten(op[1:3])[0] if id(t) in paths)
        reads = {(i, paths[k]) for i, k in used}
        return {p for i, p in reads if not any(i in span for span in self.spans[p.rpartition(".")[0]])}

    def masks(self, encoder_decoder: bool) -> dict[str, str]:
        """For each linear, the forward argument that masks the tokens it saw; empty when there is none."""
        names = {ENCODER_TOKENS: "attention_mask"}
        if encoder_decoder:
            names[DECODER_TOKENS] = "decoder_attention_mask"
        return {c.path: names.get(c.x.numel() // max(c.x.shape[-1], 1), "") for c in self.calls}


class _Recorder(TorchDispatchMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = trace

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()  # a question about values: there are none, so no
        out = func(*args, **(kwargs or {}))
        self.trace.ops.append((func, args, kwargs or {}, [t for t in tree_flatten(out)[0] if isinstance(t, Tensor)]))
        return out


class _Shape(nn.Module):
    """Stand-in for a linear: right shapes, no arithmetic."""

    def __init__(self, path: str, shape: tuple[int, int], original: nn.Module, trace: Trace) -> None:
        super().__init__()
        self.path, self.trace = path, trace
        self.in_features, self.out_features = self.nx, self.nf = shape
        weight = original._parameters.get("weight")  # an attribute could unpack a quantised one
        dtype = weight.dtype if weight is not None and weight.is_floating_point() else None
        self.weight = torch.empty(shape[1], shape[0], device="meta", dtype=dtype)
        self.bias = (
            None if getattr(original, "bias", None) is None else torch.empty(shape[1], device="meta", dtype=dtype)
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = x.new_empty(*x.shape[:-1], self.out_features)
        self.trace.calls.append(Call(self.path, x, out, len(self.trace.ops) - 1))
        return out


def _true_shape(t: Tensor) -> torch.Size:
    return getattr(t, "ds_shape", t.shape)  # a parameter that ZeRO-3 partitioned is empty itself


def _hollow(model: nn.Module, trace: Trace, train: bool) -> nn.Module:
    """A copy of ``model`` on the meta device with stand-ins for its linears."""
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty(_true_shape(p), dtype=p.dtype, device="meta"), requires_grad=False)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for path, module in model.named_modules():
        shape = linear_shape(module)
        if shape is not None and path:  # in place of a copy: what a quantised one keeps beside its parameters is large
            memo[id(module)] = _Shape(path, shape, module, trace)
            trace.linears.append(memo[id(module)])
    for module in model.modules():  # a caller's hooks expect values, and what they are bound to may be anything
        hooks = [v for k, v in vars(module).items() if k.endswith("_hooks") and isinstance(v, dict)]
        memo.update((id(v), OrderedDict()) for v in hooks)
    hollow = copy.deepcopy(model, memo)
    choose = getattr(hollow, "set_experts_implementation", None)
    if choose is not None and any(p.ndim == 3 for p in hollow.parameters()):
        choose("batched_mm")  # the base's own experts in the one way that asks for no values and takes every dtype
    for path, module in hollow.named_modules():
        stacks = {f"{path}.{n}": p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if stacks:
            trace.stacks |= stacks
            _record_calls(module, trace.spans.setdefault(path, []), trace)
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    return hollow.train(train)


def _record_calls(module: nn.Module, spans: list[range], trace: Trace) -> None:
    """Append the operations of each call of ``module`` to ``spans``."""
    starts: list[int] = []
    module.register_forward_pre_hook(lambda *_: starts.append(len(trace.ops)))
    module.register_forward_hook(lambda *_: spans.append(range(starts.pop(), len(trace.ops))))


def _images(config: Any) -> tuple[int, int, int, int] | None:
    for c in (config, getattr(config, "vision_config", None)):
        size, channels = getattr(c, "image_size", None), getattr(c, "num_channels", 3)
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else tuple(size)
            return (1, channels, height, width)
    return None


def example_inputs(model: nn.Module, device: str = "meta") -> dict[str, Tensor]:
    """The smallest inputs that reach every stream: unequal lengths for encoder and decoder."""
    names, config = inspect.signature(model.forward).parameters, getattr(model, "config", None)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = torch.zeros(1, ENCODER_TOKENS, dtype=torch.long, device=device)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = torch.zeros(1, DECODER_TOKENS, dtype=torch.long, device=device)
    images = _images(config)
    if "pixel_values" in names and images and ("input_ids" not in names or _is_dual(model)):
        inputs["pixel_values"] = torch.zeros(images, device=device)
    if "input_features" in names:
        mels, positions = getattr(config, "num_mel_bins", 80), getattr(config, "max_source_positions", 1500)
        inputs["input_features"] = torch.zeros(1, mels, 2 * positions, device=device)
    if "input_values" in names:
        inputs["input_values"] = torch.zeros(1, 16000, device=device)
    return inputs


def _is_dual(model: nn.Module) -> bool:
    """Two towers side by side (text and image) that both need an input, as in contrastive models."""
    return hasattr(getattr(model, "config", None), "projection_dim")


def trace(model: nn.Module, train: bool = False) -> Trace:
    """Record one shape-only forward of ``model``, in train mode if so asked; the global random state stays as it is.

    Raises:
        RuntimeError, TypeError, ...: whatever the model raises when it cannot run without values.
    """
    record = Trace()
    hollow = _hollow(model, record, train)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _Recorder(record):
        hollow(**example_inputs(hollow))
    return record
