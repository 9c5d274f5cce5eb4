"""Which stacked parameters of a base are targeted, and why one cannot be adapted. The model is only looked at."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import nn

from molora.config import MoloraConfig
from molora.errors import TargetError, nearest
from molora.layers.linear import FLOATS
from molora.surgery.targets import CONVOLUTIONS, Candidate, ends_with, layer_of
from molora.surgery.trace import Trace, linear_shape

__all__ = ["Stacked", "owner_of", "stacked_at", "targeted_parameters"]


@dataclass(frozen=True)
class Stacked(Candidate):
    """A parameter (experts, a, b) as a candidate: a and b are its widths, the other way round if ``transposed``."""

    experts: int
    transposed: bool


def owner_of(path: str) -> tuple[str, str]:
    """The module that holds the parameter ``path``, and the parameter's name there."""
    module, _, name = path.rpartition(".")
    return module, name


def stacked_at(model: nn.Module, path: str, read_past: Set[str] = frozenset()) -> Stacked:
    """The parameter ``path`` as stacked experts. How a weight is stored, its module says as ``is_transposed``, for PEFT
    alike. ``read_past``: as of a :class:`molora.surgery.trace.Trace`.

    Raises:
        TargetError: for a parameter that is not there, or cannot be replaced for a call.
    """
    fault = _fault(model, path, read_past)
    if fault:
        raise TargetError(f"{path}: {fault}")
    experts, a, b = model.get_parameter(path).shape
    transposed = bool(getattr(model.get_submodule(owner_of(path)[0]), "is_transposed", False))
    return Stacked(path, (a, b) if transposed else (b, a), *layer_of(path), experts, transposed)


def targeted_parameters(model: nn.Module, config: MoloraConfig, record: Trace | None) -> list[Stacked]:
    """The parameters that ``config.target_parameters`` names, in the model's order.

    Of the layers in ``layers_to_transform``, where that is given, and not in modules of ``exclude_modules``.

    Raises:
        TargetError: for a name that no parameter has, and for one that cannot be replaced for a call.
    """
    names, paths = config.target_parameters, [path for path, _ in model.named_parameters()]
    if not names:
        return []
    for name in names:
        if not any(ends_with(path, name) for path in paths):
            raise TargetError(f"target_parameters: no parameter is named {name!r}{_others(model, name)}")
    past = frozenset[str]() if record is None else record.read_past()
    wanted = [path for path in paths if any(ends_with(path, name) for name in names)]
    found = [stacked_at(model, path, past) for path in wanted]
    out = [
        s
        for s in found
        if (not config.layers_to_transform or s.layer in config.layers_to_transform)
        and not any(ends_with(owner_of(s.path)[0], e) for e in config.exclude_modules)
    ]
    if not out:
        raise TargetError(f"target_parameters={names!r}: layers_to_transform and exclude_modules leave none of them")
    return out


def _others(model: nn.Module, name: str) -> str:
    """What could have been meant, and what else holds experts."""
    ends = dict.fromkeys(
        f"{path.rpartition('.')[2]}.{n}"
        for path, m in model.named_modules()
        if not isinstance(m, CONVOLUTIONS)
        for n, p in m.named_parameters(recurse=False)
        if p.ndim == 3
    )
    hint = nearest(name, [*ends, *(e.rpartition(".")[2] for e in ends)])
    return f"{hint} Those of three dimensions are: {', '.join(ends) or 'none (packed experts are no parameters)'}"


def _fault(model: nn.Module, path: str, read_past: Set[str]) -> str:
    """Why the parameter cannot be adapted; empty if it can."""
    p = dict(model.named_parameters(remove_duplicate=False)).get(path)
    if p is None:
        return "this model has no such parameter"
    owner, kind = owner_of(path)[0], type(p).__name__
    module = model.get_submodule(owner)
    places = [other for other, q in model.named_parameters(remove_duplicate=False) if q is p]
    if hasattr(p, "ds_id") or hasattr(p, "device_mesh"):
        return "the parameter is partitioned (ZeRO-3, FSDP or tensor parallelism), expected a whole one"
    if linear_shape(module) is not None or isinstance(module, CONVOLUTIONS):
        return f"is the weight of a {type(module).__name__}, expected stacked experts; linears go into target_modules"
    if type(p) is not nn.Parameter or p.dtype not in FLOATS:
        return f"got a {kind} of {p.dtype}, expected plain floating-point numbers: quantised experts stay frozen"
    if p.ndim != 3:
        return f"got {p.ndim} dimensions, expected 3: (experts, a, b)"
    if not owner:
        return (
            "the model itself holds it, expected a module inside of the model, which can be called with other weights"
        )
    if len(places) > 1:
        return f"is shared by {', '.join(places[:3])}; an adapter on one would change the others"
    if path in read_past:
        return f"the model reads it without calling {owner}, so it cannot be replaced for a call; leave it out"
    return ""
