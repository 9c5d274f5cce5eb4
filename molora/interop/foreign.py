"""What every reader of other software's folders gives and gets, and the few steps that all of them share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from molora.adapter.atomic_save import CONFIG, CONFIG_LIMIT
from molora.adapter.names import renamings
from molora.adapter.peft_lora import HEADER_LIMIT, LoraAdapter
from molora.adapter.pickle_file import load_pickle
from molora.adapter.safetensors_file import TensorFile
from molora.adapter.strict_json import read_object
from molora.config import MoloraConfig
from molora.config.strict import matches, shown, type_name
from molora.errors import AdapterError, ConfigError, nearest
from molora.surgery.ready_made import aligned
from molora.surgery.targets import candidates, ends_with

__all__ = [
    "ASKED",
    "Asked",
    "Foreign",
    "Importer",
    "check_weights",
    "experts",
    "in_model",
    "named_base",
    "packed",
    "read_config",
    "read_tensors",
    "targets",
]

# What formats may ask the caller for; none of these is an option of transformers' from_pretrained.
ASKED = ("adapters", "lora_alpha", "scaling_pass_value", "temperature", "top_k")
# PEFT's task_type to the class that its AutoPeftModelFor... of that task loads.
TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


@dataclass(frozen=True)
class Foreign:
    """A checkpoint in this project's terms, before any of it is on the model.

    ``adapters``: ready-made experts by name, in the order of the experts, with the model's module names.
    ``tensors``: everything else, under the names that the converted model gives it.
    """

    config: MoloraConfig
    adapters: dict[str, LoraAdapter] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Asked:
    """What the caller of ``load`` added to a folder; a reader takes what its format does not record."""

    folder: Path
    allow_pickle: bool
    given: dict[str, Any]
    known: list[str] = field(default_factory=list)

    def take(self, name: str, hint: Any, meaning: str, example: str) -> Any:
        """The keyword ``name``, or a ConfigError that says what it means and shows an example."""
        value = self.optional(name, hint, None)
        if value is None:
            raise ConfigError(
                f"load: {self.folder} does not record {name}: {meaning}. Give it: molora.load(base, folder, {example})"
            )
        return value

    def optional(self, name: str, hint: Any, default: Any) -> Any:
        """The keyword ``name`` where it was given, checked for its type; else ``default``."""
        assert name in ASKED, "from_pretrained tells what is for load by this table"
        self.known.append(name)
        value = self.given.get(name)
        if value is not None and not matches(value, hint):
            raise ConfigError(f"load: {name}: got {shown(value)}, expected {type_name(hint)}")
        return default if value is None else value

    def finish(self) -> None:
        """A ConfigError for what was given and nobody needed."""
        unknown = [n for n in self.given if n not in self.known]
        if unknown:
            expected = ", ".join(dict.fromkeys(self.known)) or "nothing more"
            raise ConfigError(
                f"load: got {unknown}, but {self.folder} needs {expected}{nearest(unknown[0], self.known)}"
            )


class Importer(Protocol):
    """One format: a module with these names, and a line in ``IMPORTERS``.

    ``FILES``: which files it reads, of a repository on the Hub and of folders within; ``PICKLES``: those of them that
    are pickles, which are fetched only where the caller allows pickles.
    """

    FILES: tuple[str, ...]
    PICKLES: tuple[str, ...]

    def recognises(self, folder: Path, config: Mapping[str, Any]) -> bool:
        """Whether the folder's own files say that it is of this format; reads configs and headers at most.

        ``config``: its adapter_config.json, empty where there is none that can be read.
        """
        ...

    def read(self, folder: Path, model: nn.Module, asked: Asked) -> Foreign:
        """The whole checkpoint, checked; the model is only looked at. AdapterError or ConfigError for any fault."""
        ...


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; an empty one where there is no such file or it cannot be read."""
    try:
        return read_object(path, CONFIG_LIMIT)
    except (OSError, AdapterError):
        return {}


def named_base(folder: Path) -> tuple[str, str]:
    """The base model that a config in PEFT's layout names, "" without one, and the transformers class to load it with.

    Raises:
        AdapterError: for a base whose class is not recorded: neither a known ``task_type`` nor an ``auto_mapping``.
    """
    config = read_config(folder / CONFIG)
    name, mapped = config.get("base_model_name_or_path"), config.get("auto_mapping")
    if not isinstance(name, str) or not name:
        return "", ""
    recorded = mapped.get("base_model_class") if isinstance(mapped, dict) else None
    found = TASKS.get(str(config.get("task_type"))) or recorded
    if not isinstance(found, str):
        task = str(config.get("task_type"))[:50]
        raise AdapterError(
            f"{folder / CONFIG}: got task_type={task!r}, which does not say the class of its base, expected one of "
            f"{', '.join(TASKS)}; load the base yourself and call molora.load(base, folder)"
        )
    return name, found


def read_tensors(folder: Path, safe: str, pickle: str, asked: Asked) -> dict[str, Tensor]:
    """The weights in the file ``safe``, or else in ``pickle``, which is read only when allowed; all of them floats.

    Raises:
        AdapterError: when both are missing, or the file is damaged, holds NaN, or anything that is no weight.
    """
    try:
        tensors = TensorFile(folder / safe, header_limit=HEADER_LIMIT).load()[0]
    except FileNotFoundError:
        try:
            tensors = load_pickle(folder / pickle, allow_pickle=asked.allow_pickle)
        except FileNotFoundError as e:
            raise AdapterError(f"{folder}: there is neither {safe} nor {pickle}; the checkpoint is not whole") from e
    check_weights(folder, tensors)
    return tensors


def check_weights(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """AdapterError for a tensor that is not floating point, or that claims rows without a single number in them."""
    for name, t in tensors.items():
        if not t.is_floating_point() or not t.numel():
            got = f"{t.dtype} of shape {tuple(t.shape)}"
            raise AdapterError(f"{folder}: {name[:200]}: got {got}, expected floating-point numbers")


def in_model(folder: Path, names: Iterable[str], model: nn.Module) -> dict[str, str]:
    """Names of linears as the checkpoint has them to the model's own: the same, or all under one other prefix.

    Raises:
        AdapterError: when they fit nowhere, or in more than one way.
    """
    wanted, found = sorted(set(names)), candidates(model)
    ways = renamings(wanted, found) if wanted else []
    if len(ways) != 1:
        lost = next((n for n in wanted if not any(ends_with(p, n) for p in found)), wanted[0] if wanted else "nothing")
        how = "in more than one way" if ways else "nowhere"
        raise AdapterError(
            f"{folder}: its modules fit {how} on this {type(model).__name__} ({lost[:200]}{nearest(lost, found)}); "
            "expected a checkpoint of this base model"
        )
    return ways[0]


def targets(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """``target_modules`` that pick exactly ``paths``: the endings of their names where these do, else whole names."""
    wanted = set(paths)
    ends = sorted({p.rpartition(".")[2] for p in wanted})
    picked = {p for p in candidates(model) if any(ends_with(p, e) for e in ends)}
    return ends if picked == wanted else sorted(wanted)


def experts(
    folder: Path, model: nn.Module, adapters: Mapping[str, str | os.PathLike[str]], asked: Asked
) -> dict[str, LoraAdapter]:
    """PEFT LoRA folders as experts on this model, by name, in the given order."""
    named = all(isinstance(n, str) and isinstance(f, str | os.PathLike) for n, f in adapters.items())
    if not adapters or not named:
        raise ConfigError(
            f"load: adapters: got {shown(dict(adapters))} for {folder}, expected {{name: PEFT LoRA folder}}"
        )
    return {n: aligned(model, n, os.fspath(f), allow_pickle=asked.allow_pickle) for n, f in adapters.items()}


def packed(adapters: Mapping[str, LoraAdapter]) -> dict[str, Tensor]:
    """The ready-made experts side by side, as a bank keeps them: A (R, in_features) and B (out_features, R)."""
    paths = dict.fromkeys(path for a in adapters.values() for path in a.modules)
    out = {}
    for path in paths:
        parts = [a.modules[path] for a in adapters.values() if path in a.modules]
        out[f"{path}.bank.lora_A"] = torch.cat([A for A, _, _ in parts])
        out[f"{path}.bank.lora_B"] = torch.cat([B for _, B, _ in parts], dim=1)
    for path, (A, B, _) in (item for a in adapters.values() for item in a.fused.items()):
        out |= {f"{path}.bank.lora_A": A, f"{path}.bank.lora_B": B}
    return out
