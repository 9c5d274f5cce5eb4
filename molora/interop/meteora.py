"""Folders of MeteoRA's code: a whole model, one file or shards, whose linears hold a gate and all experts packed.

Keys: ``base_model.model.<linear>.moe_gate.weight`` (E, in), ``.lora_A.weight`` (E r, in) and ``.lora_B.weight``
(out, E r), expert after expert, beside ``.base_layer.weight`` and the rest of the base, which is not read. There is no
config: names and order of the experts, their scales and ``top_k`` are asked for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from molora.adapter.names import PREFIX
from molora.adapter.peft_lora import HEADER_LIMIT, LoraAdapter, Module
from molora.adapter.safetensors_file import TensorFile
from molora.adapter.strict_json import open_regular
from molora.config.strict import shown
from molora.errors import AdapterError, ConfigError
from molora.interop.foreign import Asked, Foreign, check_weights, in_model
from molora.recipes import RECIPES
from molora.surgery.ready_made import aligned

__all__ = ["FILES", "PICKLES", "read", "recognises"]

FILES: tuple[str, ...] = ()  # whole models, which are not fetched
PICKLES: tuple[str, ...] = ()

GATE, A_KEY, B_KEY, BASE = ".moe_gate.weight", ".lora_A.weight", ".lora_B.weight", ".base_layer.weight"
_SHARD = re.compile(r"model(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors")


def recognises(folder: Path, config: Mapping[str, Any]) -> bool:
    """A model's safetensors files with a gate among their tensors, whole or torn."""
    return any(GATE.encode() in _start(path) for path in _paths(folder))


def _paths(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if _SHARD.fullmatch(p.name)) if folder.is_dir() else []


def _start(path: Path) -> bytes:
    """The header as it lies in the file."""
    try:
        with open(open_regular(path), "rb") as file:
            return file.read(min(int.from_bytes(file.read(8), "little"), HEADER_LIMIT))
    except (OSError, AdapterError):
        return b""


def read(folder: Path, model: nn.Module, asked: Asked) -> Foreign:
    """Gates and experts as recipe ``meteora`` with ``released=True``: supervised gates, adapters that train too.

    ``adapters``: ``{name: PEFT LoRA folder}`` in the order of the experts, whose configs say the scales (A and B come
    from the checkpoint, where training may have moved them); or a list of names, and then ``lora_alpha`` of all of
    them. ``top_k`` is the number of experts a token uses; ``temperature`` divides the chosen logits, 1 unless given.

    Raises:
        AdapterError, ConfigError: for missing shards, gates and experts that disagree, another base, or keywords that
            do not fit.
    """
    tensors = _tensors(folder)
    names = in_model(folder, tensors, model)
    E = next(iter(tensors.values()))[0].shape[0]
    meaning = f"its {E} experts in the order of their ranks, by name; their PEFT LoRA folders, whose scales are needed"
    given = asked.take(
        "adapters", dict | list, meaning, "adapters={'first': 'loras/first', 'second': 'loras/second'}, ..."
    )
    places = given.values() if isinstance(given, Mapping) else ()
    named = all(isinstance(n, str) for n in given) and all(isinstance(p, str | os.PathLike) for p in places)
    if not named or len(given) != E or len(set(given)) != E:
        raise ConfigError(
            f"load: adapters: got {shown(given)}, expected {E} names, or names and folders: one an expert"
        )
    scales = _scales(folder, model, given, {names[n]: A.shape[0] // E for n, (_, A, _) in tensors.items()}, asked)
    top_k = asked.take("top_k", int, "how many experts a token uses (the folder's name says it: top_2)", "top_k=2, ...")
    options = {"top_k": top_k, "temperature": asked.optional("temperature", float, 1.0)}
    adapters = {}
    for e, name in enumerate(given):
        modules: dict[str, Module] = {}
        for path, (_, A, B) in tensors.items():
            r = A.shape[0] // E
            span, own = slice(e * r, (e + 1) * r), names[path]
            modules[own] = (A[span], B[:, span], scales[name][own])
        adapters[name] = LoraAdapter(os.fspath(given[name]) if isinstance(given, Mapping) else "", modules, None)
    try:
        config = RECIPES["meteora"](adapters={n: a.folder for n, a in adapters.items()}, released=True, **options)
    except ConfigError as e:
        raise ConfigError(f"load: {folder} with {shown(options)}: {e}") from e
    return Foreign(config, adapters, {f"{names[n]}.router.weight": gate for n, (gate, _, _) in tensors.items()})


def _tensors(folder: Path) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Gate, A and B by linear, checked against each other; of the base only shapes are looked at."""
    files = [TensorFile(path, header_limit=HEADER_LIMIT) for path in _paths(folder)]
    every = {f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))}
    if {f.path.name for f in files} not in ({"model.safetensors"}, every):
        got = ", ".join(f.path.name for f in files)
        raise AdapterError(f"{folder}: got {got}, expected one file, or every shard of one model")
    wanted: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        own = [n for n in file.entries if n.endswith(GATE) or ".lora_" in n]
        for name, t in file.take(own).items():
            if name.removeprefix(PREFIX) in wanted:
                raise AdapterError(f"{folder}: {name[:200]} stands twice, in two shards or with and without {PREFIX!r}")
            wanted[name.removeprefix(PREFIX)] = t
        shapes |= {n.removeprefix(PREFIX): e.shape for n, e in file.entries.items() if n.endswith(BASE)}
    check_weights(folder, wanted)
    flat = [n for n, t in wanted.items() if t.ndim != 2]
    if flat:
        raise AdapterError(f"{folder}: {flat[0][:200]}: got shape {tuple(wanted[flat[0]].shape)}, expected a matrix")
    paths = sorted(n.removesuffix(GATE) for n in wanted if n.endswith(GATE))
    expected = {p + key for p in paths for key in (GATE, A_KEY, B_KEY)}
    odd = sorted(expected ^ wanted.keys())
    if odd:
        what = "is missing" if odd[0] in expected else "has no gate, A and B of one linear beside it"
        raise AdapterError(f"{folder}: {odd[0][:200]} {what}; the checkpoint is not whole")
    out = {p: (wanted[p + GATE], wanted[p + A_KEY], wanted[p + B_KEY]) for p in paths}
    experts = {gate.shape[0] for gate, _, _ in out.values()}
    for p, (gate, A, B) in out.items():
        base = shapes.get(p + BASE, (B.shape[0], gate.shape[-1]))
        (E, width), out_width = gate.shape, B.shape[0]
        r = A.shape[0] // E
        fits = (A.shape, B.shape, base) == ((r * E, width), (out_width, r * E), (out_width, width))
        if len(experts) > 1 or not fits or r < 1:
            got = f"gate {tuple(gate.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, base {base}"
            raise AdapterError(
                f"{folder}: {p}: got {got}; expected (E, in), (E r, in), (out, E r), (out, in), with one E in all"
            )
    return out


def _scales(
    folder: Path, model: nn.Module, given: Any, ranks: Mapping[str, int], asked: Asked
) -> dict[str, dict[str, float]]:
    """The factor of B A by expert and linear."""
    if not isinstance(given, Mapping):
        alpha = asked.take(
            "lora_alpha", float, "the experts' lora_alpha, where no folders are given", "lora_alpha=16, ..."
        )
        if alpha <= 0:
            raise ConfigError(f"load: lora_alpha: got {alpha}, expected a value above 0")
        return {name: {path: alpha / r for path, r in ranks.items()} for name in given}
    out = {}
    for name, place in given.items():
        adapter = aligned(model, name, os.fspath(place), allow_pickle=asked.allow_pickle)
        bad = [p for p, r in ranks.items() if p not in adapter.modules or adapter.modules[p][0].shape[0] != r]
        if bad:
            got = f"rank {adapter.modules[bad[0]][0].shape[0]}" if bad[0] in adapter.modules else "nothing"
            raise AdapterError(
                f"{place}: {bad[0]}: got {got}, expected rank {ranks[bad[0]]}, an equal share of those in {folder}; "
                "adapters are in the order of the experts"
            )
        out[name] = {p: adapter.modules[p][2] for p in ranks}
    return out
