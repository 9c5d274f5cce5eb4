"""The Hugging Face Hub: the files of an adapter folder up, those of a repository down into the Hub's own cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from molora.adapter.atomic_save import CARD, CONFIG, WEIGHTS
from molora.errors import AdapterError, ConfigError

__all__ = ["OPTIONS", "local_folder", "push", "tag", "upload"]

OPTIONS = ("token", "private", "revision", "create_pr", "commit_message", "commit_description")  # of upload()
CHECKPOINTS = ["checkpoint-*", "last-checkpoint/*"]  # what a Trainer pushes beside the adapter
WEIGHT_FILES = (".safetensors", ".bin", ".pt")
Token = str | bool | None


def push(save: Callable[[str], object], repo_id: str, *, tags: Sequence[str] = (), **options: Any) -> str:
    """:func:`upload` of what ``save(folder)`` writes, with ``tags`` on its card.

    The README.md of the repository is treated as one in the folder: kept where it is somebody's own.
    """
    from huggingface_hub import HfApi

    token, revision = options.get("token"), options.get("revision")
    name = HfApi(token=token).create_repo(repo_id, private=options.get("private"), exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        _fetch_card(name, Path(folder), token, revision)
        save(folder)
        if tags:
            tag(Path(folder) / CARD, tags)
        return upload(folder, name, **options)


def upload(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: Token = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> str:
    """Commit the config, the weights and the card of an adapter folder to the repository, which is made if need be.

    Nothing else in the folder is uploaded. Options as in transformers' ``push_to_hub``; the result is the commit's
    address. Errors of the Hub pass as ``huggingface_hub`` raises them.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(name, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=os.fspath(folder),
        allow_patterns=[CONFIG, WEIGHTS, CARD],
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message or "Upload adapter",
        commit_description=commit_description,
    )
    return str(commit)


def _fetch_card(repo_id: str, folder: Path, token: Token, revision: str | None) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        card = hf_hub_download(repo_id, CARD, revision=revision, token=token)
    except (EntryNotFoundError, RevisionNotFoundError):
        return
    shutil.copyfile(card, folder / CARD)


def tag(card: Path, tags: Sequence[str]) -> None:
    """Add ``tags`` to those that stand on top of a model card."""
    from huggingface_hub import ModelCard

    read = ModelCard.load(card)
    own = read.data.tags or []
    read.data.tags = [*own, *(t for t in dict.fromkeys(tags) if t not in own)]
    read.save(card)


def local_folder(
    name: str | os.PathLike[str],
    patterns: Sequence[str],
    *,
    revision: str | None = None,
    token: Token = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Where the adapter ``name`` lies: a folder here, or ``"user/name"`` on the Hub, which is then in its cache.

    A folder of that name always wins. Of a repository, the files that ``patterns`` name are downloaded and nothing
    else; without a connection what is in the cache is taken.

    Raises:
        AdapterError: neither a folder nor a repository that can be had.
        ConfigError: a ``revision`` of a folder.
    """
    path = Path(name)
    if not isinstance(name, str) or name.count("/") != 1 or name[0] in "./~" or path.exists():
        if revision is not None:
            raise ConfigError(
                f"revision: got {revision!r} for the folder {path}, expected none: the Hub alone has them"
            )
        return path
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            name,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
            allow_patterns=list(patterns),
            ignore_patterns=CHECKPOINTS,
        )
    except (OSError, ValueError) as e:  # what huggingface_hub raises, and its check of the name
        at = f" with the revision {revision!r}" if revision else ""
        raise AdapterError(
            f"{name}: there is no such folder, and the Hugging Face Hub gave no repository of that name{at}: "
            f"{type(e).__name__}: {str(e).strip()[:500]}"
        ) from e
    if not any(f.suffix in WEIGHT_FILES for f in Path(found).rglob("*")):
        raise AdapterError(
            f"{name}: the repository on the Hugging Face Hub has no weights among {', '.join(patterns)}; pickles "
            "(adapter_model.bin) are fetched with allow_pickle=True only"
        )
    return Path(found)
