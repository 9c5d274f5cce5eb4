"""Checkpoints of a mixture's Trainer: the adapter instead of the base, whole or not there, and resumed exactly."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import distributed, nn
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from molora import processes
from molora.adapter.atomic_save import CARD, CONFIG
from molora.adapter.hub import tag
from molora.errors import CheckpointError
from molora.load import restore
from molora.training import checkpoints
from molora.training.engine import sharded

__all__ = ["WholeCheckpoints"]

PLAIN = "PyTorch"


class WholeCheckpoints(transformers.Trainer):
    """The half of :class:`molora.training.Trainer` that saves and resumes."""

    model: Any  # transformers says PreTrainedModel, Module or None
    _staging = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter folder; gathered where parameters are sharded, so every process has to call it."""
        state = self._adapter_state()
        if self.args.should_save:
            self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """transformers' card of a run; where an adapter lies in the folder, its card stays and gets the ``tags``."""
        folder, tags = Path(self.args.output_dir or ""), kwargs.get("tags")
        if not (folder / CONFIG).exists():
            super().create_model_card(*args, **kwargs)
        elif tags and self.is_world_process_zero():
            tag(folder / CARD, [tags] if isinstance(tags, str) else tags)

    def save_adapter(self, folder: Path | str) -> None:
        """Write the adapter folder and nothing else (no tokenizer, no arguments). Every process has to call it."""
        state = self._adapter_state()
        self.model.save_pretrained(folder, is_main_process=self.is_world_process_zero(), state_dict=state)

    def _adapter_state(self) -> Any:
        return sharded.adapter_state(self.model) if hasattr(self.model_wrapped, "zero_optimization_stage") else None

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(checkpoints.staging_folder(self._final(Path(folder))).parent) if self._staging else folder

    def _final(self, run: Path) -> Path:
        return run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Everything into a staging folder by every process; then, by one of them, manifest and rename."""
        run = Path(super()._get_output_dir(trial))
        final, best = self._final(run), self.state.best_model_checkpoint
        if self.state.best_global_step:
            found = run / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            best = str(found) if found.is_dir() or found == final else best
        with checkpoints.named_errors(final):
            if self.args.should_save:
                checkpoints.clear_leftovers(run)
            self.accelerator.wait_for_everyone()
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            self.state.best_model_checkpoint = best  # transformers looked for it in the staging folder
            self.accelerator.wait_for_everyone()
            state = checkpoints.staging_folder(final) / TRAINER_STATE_NAME
            if processes.anywhere(not state.exists(), self.args.device):
                raise CheckpointError("output_dir has to be a folder that all processes share")
            if self.args.should_save:
                self.state.save_to_json(str(state))
                checkpoints.publish(final, self._run())
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            kept = {"save_total_limit": self.args.save_total_limit, "use_mtime": True}
            rotate_checkpoints(str(run), best_model_checkpoint=best, **kept)  # type: ignore[arg-type]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        sharded.save_engine(self.model_wrapped, output_dir)
        if self.args.should_save:
            schedule: Any = self.lr_scheduler
            torch.save(schedule.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _run(self) -> dict[str, Any]:
        """What a run must have in common with this one to go on from its checkpoint."""
        config = json.dumps(self.model._molora.config.without_folders().to_dict(), sort_keys=True)
        stage = self._deepspeed_config().get("zero_optimization", {}).get("stage", 0)
        return {
            "mixture": f"{self.model._molora.config.recipe} {hashlib.sha256(config.encode()).hexdigest()[:12]}",
            "engine": f"DeepSpeed ZeRO-{stage}" if self.is_deepspeed_enabled else PLAIN,
            "processes": self.args.world_size,
        }

    # Resuming

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train. ``resume_from_checkpoint``: a folder, True for the newest whole one, "auto" for that or a new start.

        Raises:
            CheckpointError: a checkpoint that is not whole, of another run, or none where True asks for one.
        """
        folder = self._to_resume(resume_from_checkpoint)
        if folder is not None:
            self._check_resume(folder)
            restore(self.model, folder)
        return super().train(str(folder) if folder is not None else None, *args, **kwargs)

    def _to_resume(self, asked: Any) -> Path | None:
        """One process looks, since the digests of all files are taken; what it found or what is wrong holds for all."""
        if asked in (None, False, "", "false", "False"):
            return None
        answer: list[Any] = [None, None]
        if processes.count() == 1 or distributed.get_rank() == 0:
            try:
                answer[0] = _chosen(asked, Path(str(self.args.output_dir)))
            except CheckpointError as e:
                answer[1] = str(e)
        if processes.count() > 1:
            distributed.broadcast_object_list(answer, device=self.args.device)
        if answer[1] is not None:
            raise CheckpointError(answer[1])
        return None if answer[0] is None else Path(answer[0])

    def _check_resume(self, folder: Path) -> None:
        now = self._run()
        universal = bool(self._deepspeed_config().get("checkpoint", {}).get("load_universal"))
        plain = now["engine"] == PLAIN
        # Plain optimizer states are whole in one file; DeepSpeed's universal format can be cut for any world.
        may_differ = ("processes", "engine") if universal else ("processes",) if plain else ()
        checkpoints.check_run(folder, checkpoints.read_manifest(folder)["run"], now, may_differ)

    def _deepspeed_config(self) -> dict[str, Any]:
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return dict(plugin.deepspeed_config) if plugin is not None else {}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Nothing more: :meth:`train` put the adapter in before the model was wrapped."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)  # type: ignore[no-untyped-call]
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]
        sharded.load_engine(self.model_wrapped, resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_best_model(self) -> None:
        """Put the adapter of the best checkpoint into the model."""
        best = self.state.best_model_checkpoint
        if best is None:
            return
        if self.is_deepspeed_enabled:
            sharded.load_engine(self.model_wrapped, best)
        else:
            restore(self.model, best)


def _chosen(asked: Any, output_dir: Path) -> str | None:
    if asked in (True, "true", "True", "auto"):
        newest = checkpoints.find_newest(output_dir)
        if newest is None and asked != "auto":
            raise CheckpointError(
                f"{output_dir}: there is no checkpoint to resume from; leave resume_from_checkpoint out, or say "
                '"auto" to start anew when there is none'
            )
        return None if newest is None else str(newest)
    folder = Path(asked)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such checkpoint; expected a folder checkpoint-<step> of a run")
    checkpoints.verify(folder)
    return str(folder)
