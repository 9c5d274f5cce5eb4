"""A mixture's config as PEFT wants it: made from a recipe, or from the adapter_config.json of a molora folder."""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from peft import PeftConfig

from molora.adapter.atomic_save import CONFIG, HEADER_LIMIT, WEIGHTS
from molora.adapter.config import NAME, PEFT_TYPE, AdapterConfig, checked, disagreements, expected_tensors
from molora.adapter.folder import Described, describe
from molora.adapter.names import PREFIX
from molora.adapter.safetensors_file import TensorFile, write_tensors
from molora.config import MoloraConfig
from molora.errors import CheckpointError, ConfigError
from molora.layers.mixture import Mixture
from molora.recipes import config_of
from molora.routers import BALANCES

__all__ = ["MixtureConfig", "MixtureType", "make_config"]


class MixtureType(str, enum.Enum):  # noqa: UP042 PEFT takes str(...) apart at the dot, which StrEnum has not
    """The kind of adapter, as PEFT's own enumeration, which nobody outside of PEFT can extend, has one for each."""

    MOLORA = PEFT_TYPE


@dataclass
class MixtureConfig(PeftConfig):
    """``PeftConfig`` of a mixture. Made by :func:`molora.peft_config`, or by PEFT from a molora folder's config.

    ``config`` is the method's; the entries after ``seed`` are those of a file, see
    :class:`molora.adapter.config.AdapterConfig`. ``mixture``: what was made of it, when it is on a model.
    """

    config: Any = None
    seed: int = 0
    molora_format: Any = None
    molora_version: Any = None
    r: Any = None
    lora_alpha: Any = None
    target_modules: Any = None
    sites: Any = None
    fingerprint: Any = None
    sha256: Any = None
    checksum: Any = None

    def __post_init__(self) -> None:
        """Check the entries of a file as strictly as :func:`molora.load` does.

        Raises:
            AdapterError: for a config that was damaged or edited, or is not one of molora's.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.described: Described | None = None
        self.mixture: Mixture | None = None
        if not isinstance(self.config, MoloraConfig):
            entries = {f.name: getattr(self, f.name) for f in fields(AdapterConfig)}
            document, _ = checked(entries, CONFIG)
            base = {NAME: document.base_model_name_or_path, **document.fingerprint}
            self.config = document.config
            self.described = Described(Path(CONFIG), document.config, document.sites, base, document.sha256)
            if self.task_type is None:  # by which AutoPeftModelFor... finds the base's class
                names = {"base_model_class": document.fingerprint["class"], "parent_library": "transformers"}
                self.auto_mapping = names
        self.peft_type = MixtureType.MOLORA
        if self.task_type is not None and any(
            BALANCES[b.kind].needs_tasks for p in self.config.placements for b in p.balance
        ):
            raise ConfigError(
                f"task_type: got {str(self.task_type)!r} with a router that learns from task_ids, which PEFT's class "
                "for it keeps from the model; leave task_type out, or take gate_loss_coef=0"
            )

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write molora's adapter_config.json for the weights that PEFT has just written, with their digest.

        Raises:
            CheckpointError: when there is no model of it, or the weights are not safetensors or not the mixture's.
        """
        folder, mixture = Path(save_directory), self.mixture
        if mixture is None:
            raise CheckpointError(
                "this config was not used for a model yet; save the model that get_peft_model returns"
            )
        if not (folder / WEIGHTS).is_file():
            raise CheckpointError(f"{folder}: molora's adapters are safetensors; save with safe_serialization=True")
        file = _without_originals(folder / WEIGHTS)
        header = {n.removeprefix(PREFIX): (e.shape, e.dtype) for n, e in file.entries.items()}
        faults = disagreements(mixture.config, expected_tensors(mixture.config, mixture.sites), header)
        if faults:
            raise CheckpointError(
                f"{folder}: PEFT saved other tensors than the mixture's: {'; '.join(faults)}. PEFT adds embeddings "
                "that were resized: name them in modules_to_save, or pass save_embedding_layers=False and save the "
                "base, too"
            )
        base = {**mixture.fingerprint, NAME: self.base_model_name_or_path or mixture.fingerprint.get(NAME)}
        task = None if self.task_type is None else str(getattr(self.task_type, "value", self.task_type))
        document = describe(mixture.config, mixture.sites, base, task).replace(sha256=file.sha256())
        _replace(folder / CONFIG, lambda new: new.write(document.text().encode()))

    def to_dict(self) -> dict[str, Any]:
        """The recipe's config and what PEFT keeps, without folders; for logs and model cards."""
        return {
            "peft_type": PEFT_TYPE,
            "task_type": self.task_type,
            NAME: self.base_model_name_or_path,
            "inference_mode": self.inference_mode,
            "seed": self.seed,
            "config": self.config.without_folders().to_dict(),
        }


def make_config(
    recipe: str | MoloraConfig, *, seed: int, task_type: str | None, options: Mapping[str, Any]
) -> MixtureConfig:
    """:func:`molora.peft_config`, where PEFT is installed."""
    return MixtureConfig(config=config_of(recipe, options), seed=seed, task_type=task_type)


def _without_originals(path: Path) -> TensorFile:
    """The file, after leaving out what PEFT adds of resized embeddings where the mixture has copies of them."""
    file = TensorFile(path, header_limit=HEADER_LIMIT)
    beside = {n for n in file.entries if ".original." in n and n.replace(".original.", ".trained.") in file.entries}
    if not beside:
        return file
    tensors = file.take(n for n in file.entries if n not in beside)
    _replace(path, lambda new: write_tensors(new, tensors))
    return TensorFile(path, header_limit=HEADER_LIMIT)


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    new = path.with_name(f".{path.name}.tmp")
    try:
        with open(new, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
