"""evaluation.json: everything that an evaluation found, one file a run, the source of every report.

``schema``, ``name`` and ``provenance`` (adapter, base, data, settings, versions) always; ``routing``
(:mod:`molora.eval.counting.summary`), ``experts`` (:mod:`molora.eval.counting.experts`), ``scores``
(:mod:`molora.eval.scoring.section`), ``ablation`` (:mod:`molora.eval.ablation.section`) and ``training`` (the Trainer's
log) where they were made; ``tokens``: the text of every token id that stands in it; ``expert_names``: where experts
come from adapters. It holds no time of day, so the same evaluation gives the same bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from molora.errors import ConfigError

__all__ = ["FILE", "SCHEMA", "add_sections", "plain", "read_document", "write_json"]

SCHEMA = 1
DIGITS = 6
FILE = "evaluation.json"
SECTIONS = ("routing", "experts", "scores", "ablation", "training")
# What each section cannot do without: an entry and its type. More is checked by nobody; a page shows what is there.
NEEDED: dict[str, tuple[tuple[str, type], ...]] = {
    "routing": (("sites", list), ("domains", dict), ("load", dict), ("samples", list), ("vocabulary", list)),
    "experts": (),
    "scores": (),
    "ablation": (("loss", dict), ("interventions", list)),
}


def read_document(path: Path | str) -> dict[str, Any]:
    """The document in a file, or in the folder that ``molora eval`` wrote.

    Raises:
        ConfigError: missing, not JSON, no evaluation, of a newer schema, or with a section that is not whole.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    remedy = "write one with `molora eval routing ADAPTER --domain NAME=FILE`"
    try:
        value: Any = json.loads(file.read_bytes())
    except FileNotFoundError as e:
        raise ConfigError(f"{file} does not exist; {remedy}") from e
    except (OSError, ValueError) as e:
        raise ConfigError(f"{file}: cannot be read as JSON: {e}; {remedy}") from e
    schema = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(schema, int) or isinstance(schema, bool) or not isinstance(value.get("provenance"), dict):
        raise ConfigError(f"{file}: is no evaluation: got no schema number and provenance; {remedy}")
    if schema > SCHEMA:
        raise ConfigError(
            f"{file}: got schema {schema}, expected at most {SCHEMA}: it was written by a newer molora; update this one"
        )
    faults = _faults(value)
    if faults:
        raise ConfigError(f"{file}: is not whole: {'; '.join(faults)}; {remedy}")
    found: dict[str, Any] = value
    return found


def _faults(value: Mapping[str, Any]) -> list[str]:
    out = []
    for section, needed in NEEDED.items():
        if section not in value:
            continue
        if not isinstance(value[section], dict):
            out.append(f"{section}: got {type(value[section]).__name__}, expected an object")
            continue
        for key, kind in needed:
            if not isinstance(value[section].get(key), kind):
                out.append(f"{section}: got no {key!r} ({kind.__name__})")
    return out


def add_sections(
    path: Path, name: str, provenance: Mapping[str, Any], sections: Mapping[str, Any], tokens: Mapping[str, str]
) -> dict[str, Any]:
    """Put ``sections`` into the document in the file ``path``, which is begun if it is not there, and return it.

    Raises:
        ConfigError: the document there is of another adapter, other data or other settings; it is left as it is.
    """
    before = read_document(path) if path.exists() else {"provenance": provenance}
    differing = [k for k in provenance if provenance[k] != before["provenance"].get(k)]
    if differing:
        raise ConfigError(
            f"{path}: holds another evaluation, they differ in {', '.join(differing)}; give another --out, or the same "
            "adapter, data and settings"
        )
    found = {**{k: before[k] for k in SECTIONS if k in before}, **sections}
    document = {"schema": SCHEMA, "name": name, "provenance": dict(provenance)}
    for key in ("expert_names", *SECTIONS):
        if key in found:
            document[key] = found[key]
    known = {**before.get("tokens", {}), **tokens}
    document["tokens"] = {k: known[k] for k in sorted(known, key=int)}
    write_json(document, path)
    return document


def plain(value: Any, digits: int = DIGITS) -> Any:
    """Tensors and tuples as lists, numbers to some digits: what JSON holds."""
    if isinstance(value, Tensor):
        return plain(value.tolist(), digits)
    if isinstance(value, Mapping):
        return {str(k): plain(v, digits) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, digits) for v in value]
    return round(value, digits) if isinstance(value, float) else value


def write_json(value: Any, path: Path) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".new")
    staged.write_text(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(staged, path)
