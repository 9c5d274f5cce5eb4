"""PEFT's ``target_parameters`` on stacked experts: how it names and packs their LoRAs, to and from our packing.

PEFT wraps the module once for each of its targeted parameters, in the order in which the module holds them: the last
one's matrices stand under the module's own name, those of the others under ``.base_layer`` once or more. A is packed as
here, expert after expert; B's columns run through the experts fastest: column ``i E + e`` is rank i of expert e.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.adapter.peft_lora_config import WEIGHT, named_parameters, rank, scale
from molora.errors import AdapterError

__all__ = ["expert_fastest", "expert_slowest", "file_paths", "module_of", "parted", "placed", "stacked_names"]
__all__ += ["to_file"]

INNER = ".base_layer"

Pair = tuple[Tensor, Tensor]


def stacked_names(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Those of ``target_parameters`` that are no weights of linears."""
    return tuple(n for n in named_parameters(path, config) if not n.endswith(WEIGHT))


def module_of(path: str) -> str:
    """The module under whose name, or a wrapper's inside, PEFT saved a pair."""
    while path.endswith(INNER):
        path = path.removesuffix(INNER)
    return path


def _fits(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def parted(
    where: Path, config: Mapping[str, Any], pairs: Mapping[str, Pair], names: Sequence[str]
) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """``pairs`` of linears, and those of stacked experts, on the modules that ``names`` name.

    A name may be the parameter's alone; then a pair is one of stacked experts if another stands inside of it, or if it
    has another rank than the config gives to a linear there.
    """
    owners = {n.rpartition(".")[0] for n in names}
    nested = {module_of(path) for path in pairs if path.endswith(INNER)} if names else set()

    def is_stacked(path: str, A: Tensor) -> bool:
        if module_of(path) in nested or any(o and _fits(path, o) for o in owners):
            return True
        return "" in owners and rank(where, config, path) != A.shape[0]

    stacks = {path: pair for path, pair in pairs.items() if is_stacked(path, pair[0])}
    return {path: pair for path, pair in pairs.items() if path not in stacks}, stacks


def placed(
    where: Path, config: Mapping[str, Any], stacks: Mapping[str, Pair], model: nn.Module, new_name: Mapping[str, str]
) -> dict[str, tuple[Tensor, Tensor, float]]:
    """By path of the parameter in ``model``: A (E r, in), B (out, E r) in our packing, and the scale.

    ``new_name``: modules of the file to those of the model.

    Raises:
        AdapterError: when the pairs are not those of the named parameters, or of other shapes.
    """
    names, seen, out = stacked_names(where, config), list[str](), {}
    for module in dict.fromkeys(module_of(path) for path in stacks):
        here = new_name[module]
        found = [n for n, _ in model.get_submodule(here).named_parameters(recurse=False)]
        found = [n for n in found if any(_fits(f"{module}.{n}", name) for name in names)]
        files = file_paths(module, found)
        if sorted(files.values()) != sorted(p for p in stacks if module_of(p) == module):
            raise AdapterError(
                f"{where}: {module}: got matrices of {sum(module_of(p) == module for p in stacks)} parameters, the "
                f"model has {', '.join(found) or 'none'} of those that target_parameters names there"
            )
        for name, file in files.items():
            shape = tuple(model.get_parameter(f"{here}.{name}").shape)
            A, B = stacks[file]
            if len(shape) != 3 or A.shape[0] % shape[0] or {A.shape[1], B.shape[0]} != set(shape[1:]):
                raise AdapterError(
                    f"{where}: {module}.{name}: got A {tuple(A.shape)} and B {tuple(B.shape)} for a parameter of shape "
                    f"{shape}, expected (E r, in) and (out, E r): it was made for another base"
                )
            seen.append(f"{module}.{name}")
            factor = scale(where, config, f"{module}.{name}", A.shape[0] // shape[0])
            out[f"{here}.{name}"] = A, expert_slowest(B, shape[0]), factor
    unseen = [n for n in names if not any(_fits(p, n) for p in seen)]
    if unseen:
        raise AdapterError(f"{where}: got target_parameters={unseen[:3]}, but the file has no matrices for them")
    return out


def file_paths(module: str, names: Iterable[str]) -> dict[str, str]:
    """Where PEFT keeps the matrices of the parameters ``names`` of ``module``, in the module's order."""
    ordered = list(names)
    return {name: module + INNER * (len(ordered) - 1 - i) for i, name in enumerate(ordered)}


def to_file(stacks: Mapping[str, tuple[Tensor, Tensor, float, int]]) -> dict[str, Pair]:
    """Path of a parameter to A, B in our packing, scale and E, to PEFT's path and matrices."""
    modules: dict[str, list[str]] = {}
    for path in stacks:
        modules.setdefault(path.rpartition(".")[0], []).append(path.rpartition(".")[2])
    places = {f"{m}.{n}": file for m, names in modules.items() for n, file in file_paths(m, names).items()}
    return {places[path]: (A, expert_fastest(B, E)) for path, (A, B, _, E) in stacks.items()}


def expert_slowest(B_OR: Tensor, experts: int) -> Tensor:
    """B from PEFT's packing to ours."""
    return B_OR.view(B_OR.shape[0], -1, experts).transpose(1, 2).reshape(B_OR.shape)


def expert_fastest(B_OR: Tensor, experts: int) -> Tensor:
    """B from our packing to PEFT's."""
    return B_OR.view(B_OR.shape[0], experts, -1).transpose(1, 2).reshape(B_OR.shape)
