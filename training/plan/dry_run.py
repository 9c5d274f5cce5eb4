"""The plan of a training run from its arguments: nothing is downloaded, no weights are loaded, nothing is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from molora.adapter.peft_lora import LoraAdapter
from molora.config import MoloraConfig
from molora.convert import put_on
from molora.data.builtin.domains import BUILTIN_DOMAINS, domain_records
from molora.data.builtin.model import BUILTIN
from molora.data.records import source
from molora.data.sources import HUB
from molora.errors import ConfigError
from molora.recipes import RECIPES
from molora.surgery.ready_made import aligned
from molora.surgery.resolve import resolve
from molora.training.arguments import Arguments, DataArguments
from molora.training.job import load_tokenizer, recipe_config
from molora.training.models import IMAGES, load_processor, task_of
from molora.training.plan.overview import Batch, Plan, plan
from molora.training.plan.shapes import base_without_storage
from molora.training.rows import prepare_data

__all__ = ["DryRun", "dry_run"]


@dataclass(frozen=True)
class DryRun:
    """A plan, and in words what it rests on: where the number of rows is from, which files are not here."""

    plan: Plan
    notes: tuple[str, ...]


def dry_run(arguments: Arguments, gpus: int = 1) -> DryRun:
    """Plan the run of ``arguments`` on ``gpus`` GPUs.

    Files that are not here do not stop it: missing domains leave the rows unknown (or as ``assumed_rows`` says), and
    missing adapter folders are taken to be as ``assumed_adapters`` says.

    Raises:
        ConfigError: as a run would for these arguments, files that are here included; ``gpus`` below 1; a base of
            unknown shapes; adapter folders that are missing without ``assumed_adapters``.
    """
    if gpus < 1:
        raise ConfigError(f"gpus: got {gpus}, expected at least 1")
    config, settings = recipe_config(arguments.mixture), arguments.training
    model = base_without_storage(arguments.model)
    rows, notes = _rows(arguments)
    notes += _convert(model, config, arguments.plan.assumed_adapters)
    batch = Batch(
        micro=settings.per_device_train_batch_size,
        accumulation=_accumulation(arguments, gpus),
        gpus=gpus,
        length=arguments.data.max_length,
    )
    found = plan(
        model,
        batch,
        checkpointing=bool(settings.gradient_checkpointing),
        cast=settings.bf16 or settings.fp16,
        rows=rows,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
    )
    return DryRun(found, tuple(notes))


def _accumulation(arguments: Arguments, gpus: int) -> int:
    """Accumulated micro-steps; for a global batch size, those of ``gpus`` GPUs and not of the processes here."""
    wanted, at_once = arguments.data.global_batch_size, arguments.training.per_device_train_batch_size * gpus
    if wanted % at_once:
        raise ConfigError(f"global_batch_size: got {wanted}, expected a multiple of {at_once} on {gpus} GPUs")
    return wanted // at_once or arguments.training.gradient_accumulation_steps


def _rows(arguments: Arguments) -> tuple[int | None, list[str]]:
    """Training rows as far as they can be known, and where the number is from."""
    data, assumed = arguments.data, arguments.plan.assumed_rows
    missing = _missing(data)
    listed = ", ".join(f"{name} = {source}" for name, source in missing.items())
    notes = [f"missing: {listed}; a training run needs them"] if missing else []
    if data.train_examples:
        return data.train_examples, [*notes, "rows: as train_examples says"]
    name = arguments.model.model_name_or_path
    if not missing and not name.startswith(BUILTIN) and Path(name).is_dir():
        tokenizer = load_tokenizer(arguments.model)
        task = task_of(arguments.model)
        encoder = load_processor(arguments.model) if task == IMAGES else tokenizer
        found = prepare_data(data, encoder, arguments.training.seed, task)
        return len(found.train), [*notes, "rows: counted"]
    why = "data files are missing" if missing else "counting needs a model folder with its tokenizer"
    if assumed:
        return assumed, [*notes, f"rows: as assumed_rows says, since {why}"]
    return None, [*notes, f"rows: unknown, since {why}; --assumed_rows N plans with N"]


def _missing(data: DataArguments) -> dict[str, str]:
    sources = {f"domains.{k}": source(v).path for k, v in data.domains.items()}
    sources |= {f"heldout_domains.{k}": source(v).path for k, v in data.heldout_domains.items()}
    for path in sources.values():
        if path.startswith(BUILTIN) and path.removeprefix(BUILTIN) not in BUILTIN_DOMAINS:
            domain_records(path)  # raises, and says which there are
    return {k: v for k, v in sources.items() if not v.startswith((BUILTIN, HUB)) and not Path(v).exists()}


def _convert(model: PreTrainedModel, config: MoloraConfig, assumed: Mapping[str, Any]) -> list[str]:
    """Convert in place, with assumed adapters for those that are not here; notes on them."""
    notes, stand_in = [], None
    missing = {name: folder for name, folder in config.adapters if not Path(folder).exists()}
    if missing:
        if not assumed:
            name, folder = next(iter(missing.items()))
            raise ConfigError(
                f"adapters: {len(missing)} folders do not exist, the first is {name}: {folder}; for a plan without "
                "them say what they are, as assumed_adapters: {r: 16, lora_alpha: 16, target_modules: [q_proj, v_proj]}"
            )
        stand_in = _assumed_adapter(model, assumed)
        notes.append(f"adapters: {len(missing)} of {len(config.adapters)} are not here, assumed as {dict(assumed)}")
    if config.init_from and not Path(config.init_from).exists():
        notes.append(f"missing: init_from = {config.init_from}; a training run needs it")
        config = config.replace(init_from="")
    adapters = {n: stand_in if n in missing and stand_in else aligned(model, n, f) for n, f in config.adapters}
    put_on(model, config, adapters)
    return notes


def _assumed_adapter(model: PreTrainedModel, options: Mapping[str, Any]) -> LoraAdapter:
    """An adapter without storage, of the ranks and on the linears that recipe ``lora`` with ``options`` gives."""

    def matrix(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device="meta")

    sites = resolve(model, RECIPES["lora"](**options), {})
    if any(s.role == "parameter" for s in sites):
        raise ConfigError("assumed_adapters: got target_parameters, expected linears, which alone can be mixed")
    modules = {
        s.path: (matrix(s.ranks[0], s.in_features), matrix(s.out_features, s.ranks[0]), s.scales[0]) for s in sites
    }
    return LoraAdapter("", modules, None)
