"""Training checkpoints that are whole or not there: staged, named in a manifest, renamed into place at the end.

transformers writes its files straight into ``checkpoint-N`` and takes the highest N to resume from, whatever is in it.
Here the folder gets its name only when every file of every process is on the disk, and the manifest in it says which
files there are, with their sizes and digests. A folder without a manifest that fits is never resumed from.

These checkpoints hold pickles (optimizer and random states): resume only from your own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from molora.errors import CheckpointError

__all__ = ["MANIFEST", "check_run", "find_newest", "publish", "read_manifest", "staging_folder", "verify"]

MANIFEST = "molora_manifest.json"
FORMAT = 1
NAME = re.compile(r"checkpoint-(\d+)")
STAGING = ".{}.partial"  # hidden, and no name that transformers or find_newest would take for a checkpoint
SET_ASIDE = ".{}.replaced"
BLOCK = 1 << 20
log = logging.getLogger(__name__)


def staging_folder(final: Path) -> Path:
    """Where the files of ``final`` are written until it is whole, below the same parent."""
    return final.parent / STAGING.format(final.name) / final.name


def clear_leftovers(parent: Path) -> None:
    """Remove what killed saves left beside the checkpoints."""
    for pattern in (STAGING, SET_ASIDE):
        for path in parent.glob(pattern.format("checkpoint-*")):
            shutil.rmtree(path, ignore_errors=True)


def publish(final: Path, run: Mapping[str, Any]) -> None:
    """Give the files in the staging folder of ``final`` their place, all on the disk and listed in a manifest.

    ``run``: what a run must have in common with this one to resume from it. Called by one process, when all are done.
    """
    staged = staging_folder(final)
    files = {p.relative_to(staged).as_posix(): p for p in sorted(staged.rglob("*")) if p.is_file()}
    entries = {name: {"bytes": p.stat().st_size, "sha256": _digest(p, sync=True)} for name, p in files.items()}
    manifest = staged / MANIFEST
    with open(manifest, "w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT, "run": dict(run), "files": entries}, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    for folder in (*(p for p in staged.rglob("*") if p.is_dir()), staged):
        _sync_folder(folder)
    aside = final.parent / SET_ASIDE.format(final.name)
    if final.exists():  # a step that was trained again after resuming from an earlier one
        os.replace(final, aside)
    os.replace(staged, final)
    _sync_folder(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(staged.parent, ignore_errors=True)


def _digest(path: Path, sync: bool = False) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sha256.update(block)
        if sync:
            os.fsync(file.fileno())
    return sha256.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: when there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: got no {MANIFEST}, expected a checkpoint of molora's Trainer; a save that was cut off has none"
        ) from None
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    number = manifest.get("format") if isinstance(manifest, dict) else None
    if number != FORMAT or not isinstance(manifest.get("files"), dict) or not isinstance(manifest.get("run"), dict):
        raise CheckpointError(f"{path}: got format {number!r}, expected {FORMAT}")
    return dict(manifest)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest, with every file of it there in the size and with the digest that it names; others do not count.

    Raises:
        CheckpointError: naming the first file that is missing or changed.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise CheckpointError(f"{folder}: its manifest names {name!r}, which is not below it")
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; resume from an earlier checkpoint")
        if path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"]:
            raise CheckpointError(f"{folder}: {name} was changed or damaged; resume from an earlier checkpoint")
    return manifest


def find_newest(folder: Path | str) -> Path | None:
    """The newest whole checkpoint of a run's output folder; None when there is no checkpoint at all.

    Raises:
        CheckpointError: when there are checkpoints and none is whole, with what is wrong with each.
    """
    faults = []
    for path in sorted(_checkpoints(Path(folder)), key=_number, reverse=True):
        try:
            verify(path)
        except CheckpointError as e:
            faults.append(str(e))
            continue
        for fault in faults:
            log.warning("passed over: %s", fault)
        return path
    if faults:
        raise CheckpointError(f"{folder}: no whole checkpoint to resume from:\n" + "\n".join(faults))
    return None


def _checkpoints(folder: Path) -> list[Path]:
    return [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name) and p.is_dir()]


def _number(path: Path) -> int:
    found = NAME.fullmatch(path.name)
    return int(found[1]) if found else -1


def check_run(folder: Path, recorded: Mapping[str, Any], now: Mapping[str, Any], may_differ: tuple[str, ...]) -> None:
    """Compare what a checkpoint records of its run with the run that wants to resume.

    Raises:
        CheckpointError: naming every difference but those that ``may_differ``.
    """
    keys = [k for k in now if k not in may_differ and recorded.get(k) != now[k]]
    if keys:
        differences = "; ".join(f"{k}: it has {recorded.get(k)!r}, this run {now[k]!r}" for k in keys)
        raise CheckpointError(
            f"{folder}: was made by another run ({differences}). Resume with the same settings, or start a new run "
            "from its adapter with molora.load(base, folder, trainable=True)"
        )


@contextlib.contextmanager
def named_errors(final: Path) -> Iterator[None]:
    """Turn whatever a full disk or missing rights raise in a save into one CheckpointError; nothing half stays."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointError) as e:  # torch.save reports a full disk as a RuntimeError
        shutil.rmtree(staging_folder(final).parent, ignore_errors=True)
        raise CheckpointError(
            f"{final}: the checkpoint could not be saved ({e}); earlier ones are unharmed. Check the free space and "
            "your rights there, then resume from the newest"
        ) from e
    except BaseException:
        shutil.rmtree(staging_folder(final).parent, ignore_errors=True)
        raise
