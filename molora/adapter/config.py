"""adapter_config.json: what an adapter says about itself, and which tensors therefore belong to it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from molora.adapter.fingerprint import fingerprint_faults
from molora.config import MoloraConfig, Placement
from molora.config.site import SiteConfig
from molora.config.strict import PerLayer, Strict
from molora.errors import AdapterError, ConfigError
from molora.kernels.dispatch import FORMER_NAMES, KERNELS
from molora.layers.banks import config_faults, expected_shapes, site_faults
from molora.layers.mixture import HEAD
from molora.routers import BALANCES, GATES, ROUTERS

__all__ = [
    "FORMAT",
    "NAME",
    "PEFT_TYPE",
    "AdapterConfig",
    "Header",
    "checked",
    "checksum",
    "disagreements",
    "expected_tensors",
]

FORMAT = 1
PEFT_TYPE = "MOLORA"
NAME = "base_model_name_or_path"
UNKNOWN = 999_999_937  # stands for the width of the hidden states while a head is built; nothing else has this width
ANY = -1  # in an expected shape: whatever the model has
MAX_EXPERTS = 1 << 24  # over all sites; ranks and scales are spelled out per expert when a bank is built

Shape = tuple[int, ...]
Header = Mapping[str, tuple[Shape, torch.dtype]]


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(Strict):
    """adapter_config.json. ``r``, ``lora_alpha`` and ``target_modules`` inform; ``config`` and ``sites`` decide.

    ``sha256`` is that of the weights file, ``checksum`` that of all the rest (:func:`checksum`).
    """

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    molora_format: int
    molora_version: str
    r: PerLayer
    lora_alpha: float
    target_modules: tuple[str, ...]
    config: MoloraConfig
    sites: tuple[SiteConfig, ...]
    fingerprint: dict  # type: ignore[type-arg]
    sha256: str
    checksum: str

    def faults(self) -> list[str]:
        """What no single field shows: the format, paths and placements of the sites, and sizes out of all reason."""
        if not isinstance(self.config, MoloraConfig) or not isinstance(self.fingerprint, dict):
            return []  # ill-typed entries, which are faults of their own, stand as blanks here
        out = [] if self.molora_format == FORMAT else [f"molora_format: got {self.molora_format}, expected {FORMAT}"]
        out += fingerprint_faults(self.fingerprint)
        twice = [p for p, n in Counter(s.path for s in self.sites).items() if n > 1]
        out += [f"sites: {p[:200]!r} stands twice" for p in twice[:3]]
        for s in self.sites:
            if not (s.path.isprintable() and all(s.path.split(".")) and len(s.path) < 1000):
                out.append(f"sites: path: got {s.path[:200]!r}, expected names joined by dots")
            if not 0 <= s.placement < len(self.config.placements):
                out.append(
                    f"{s.path[:200]}: placement: got {s.placement}, expected 0 to {len(self.config.placements) - 1}"
                )
            if s.ranks and not s.scales:
                out.append(f"{s.path[:200]}: scales: got none for ranks {str(s.ranks)[:100]}")
            out += [f"{s.path[:200]}: {fault}" for fault in site_faults(s)]
        wide = any(p.router.scope == "model" for p in self.config.placements)
        if wide and sorted(s.index for s in self.sites) != list(range(len(self.sites))):
            out.append(f"sites: index: expected each of 0 to {len(self.sites) - 1} once, for the model-wide router")
        if sum(s.num_experts for s in self.sites) > MAX_EXPERTS:
            out.append(f"sites: got more than {MAX_EXPERTS:,} experts in all")
        for p in self.config.placements:
            out += _unknown("router", p.router.kind, ROUTERS)
            out += [fault for b in p.balance for fault in _unknown("balance rule", b.kind, BALANCES)]
            out += _unknown("gate", p.gate.kind, GATES)
        out += config_faults(self.config)
        out += _unknown("kernel", self.config.kernel, ("auto", *KERNELS, *FORMER_NAMES))
        return out[:10]

    def text(self) -> str:
        """The file: sorted keys, one site a line, the sites' default values left out, with its checksum."""
        defaults = {f.name: f.default for f in fields(SiteConfig)}
        values = self.to_dict()
        values["sites"] = [{k: v for k, v in s.items() if v != defaults[k]} for s in values["sites"]]
        values["checksum"] = checksum(values)
        lines = []
        for key, value in sorted(values.items()):
            text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False).replace("\n", "\n  ")
            if key == "sites":
                text = "[\n    " + ",\n    ".join(json.dumps(s, sort_keys=True) for s in value) + "\n  ]"
            lines.append(f"  {json.dumps(key)}: {text}")
        return "{\n" + ",\n".join(lines) + "\n}\n"


def _unknown(what: str, name: str, known: Collection[str]) -> list[str]:
    return [] if name in known else [f"{what}: got {name[:100]!r}, expected one of {', '.join(known)}"]


def checksum(values: Mapping[str, Any]) -> str:
    """sha256 of the entries as they stand in the file, but for itself and the base's name, which users may edit."""
    covered = {k: v for k, v in values.items() if k not in ("checksum", NAME)}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def checked(raw: Mapping[str, Any], where: object) -> tuple[AdapterConfig, dict[str, Shape]]:
    """The config file with the entries ``raw``, and the tensors that it describes.

    Raises:
        AdapterError: for another kind of adapter, a newer format, values out of range, or a checksum that does not fit.
    """
    kind, number = raw.get("peft_type"), raw.get("molora_format")
    if kind != PEFT_TYPE:
        raise AdapterError(
            f"{where}: got an adapter of peft_type {str(kind)[:100]!r}, expected {PEFT_TYPE!r}, molora's own"
        )
    if type(number) is int and number > FORMAT:
        raise AdapterError(f"{where}: got format {number}, this molora reads up to {FORMAT}; upgrade molora")
    try:
        document = AdapterConfig.from_dict(raw)
        expected = expected_tensors(document.config, document.sites)
    except ValueError as e:  # a ConfigError, or a check that stumbled over hostile values
        raise AdapterError(f"{where}: {str(e)[:2000]}") from e
    if document.checksum != checksum(raw):
        raise AdapterError(
            f"{where}: its checksum does not fit its text: it was damaged or edited (only {NAME} may be). "
            "Fetch or save the adapter again"
        )
    return document, expected


def expected_tensors(config: MoloraConfig, sites: Sequence[SiteConfig]) -> dict[str, Shape]:
    """Names and shapes of the banks and routers that the sites have; ``ANY`` for a width that only the model knows.

    Copies of ``modules_to_save`` (``<path>.trained.<name>``) come on top; the config does not know their shapes.

    Raises:
        ConfigError: for a router so large that its shape overflows.
    """
    out: dict[str, Shape] = {}
    routers: dict[tuple[int, int, int], dict[str, Shape]] = {}
    for site in sites:
        out |= {f"{site.path}.{name}": shape for name, shape in expected_shapes(site).items()}
        placement = config.placements[site.placement]
        if site.lead and placement.router.scope != "model":
            key = (site.placement, site.in_features, site.num_experts)
            if key not in routers:
                routers[key] = _router(placement, *key[1:])
            out |= {f"{site.path}.router.{name}": shape for name, shape in routers[key].items()}
    wide = [p for p in config.placements if p.router.scope == "model"]
    if wide and sites:
        head = _router(wide[0], UNKNOWN, sites[0].num_experts, len(sites))
        out |= {f"{HEAD}.{name}": tuple(ANY if n == UNKNOWN else n for n in shape) for name, shape in head.items()}
    return out


def _router(placement: Placement, *sizes: int) -> dict[str, Shape]:
    """What a router of these sizes keeps, by building one without storage."""
    kind, router, gate = placement.router.kind, placement.router, placement.gate
    in_features, num_experts, *num_sites = sizes
    try:
        built = ROUTERS[kind](in_features, num_experts, router, gate, *num_sites, torch.device("meta"))
    except (RuntimeError, TypeError, AttributeError) as e:  # a size that overflows; a kind that takes other sizes
        raise ConfigError(f"a router of kind {kind!r} and scope {router.scope!r} cannot have sizes {sizes}: {e}") from e
    shapes = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    if built.steerable and any(BALANCES[b.kind].steers for b in placement.balance):
        shapes["select_bias"] = (num_experts,)
    return shapes


def disagreements(config: MoloraConfig, expected: Mapping[str, Shape], header: Header) -> list[str]:
    """How the tensors of ``header`` differ from the ``expected`` ones, in words; empty when they agree."""
    missing = [n for n in expected if n not in header]
    extra = [n for n in header if n not in expected and not any(_is_copy_of(m, n) for m in config.modules_to_save)]
    faults = [
        f"{what}: {', '.join(n[:200] for n in names[:3])}{' ...' if len(names) > 3 else ''} ({len(names)} in all)"
        for what, names in (("missing", missing), ("not expected", extra))
        if names
    ]
    for name in config.modules_to_save:
        if not any(_is_copy_of(name, n) for n in header):
            faults.append(f"missing: the trained copy of {name[:200]!r}, one of modules_to_save")
    for name in expected:
        shape, dtype = header.get(name, (expected[name], torch.float32))
        fits = len(shape) == len(expected[name]) and all(
            e in (ANY, n) for n, e in zip(shape, expected[name], strict=True)
        )
        if not fits:
            faults.append(f"{name}: got shape {shape}, expected {expected[name]}")
        if not dtype.is_floating_point:
            faults.append(f"{name}: got {dtype}, expected floating point")
    return faults[:5]


def _is_copy_of(module: str, name: str) -> bool:
    """Whether the tensor ``name`` belongs to the trained copy of a module whose path ends in ``module``."""
    path, found, _ = name.partition(".trained.")
    return bool(found) and (path == module or path.endswith(f".{module}"))
