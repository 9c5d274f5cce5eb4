"""Saving an adapter folder so that whoever reads it, at any moment or after a crash, finds the old one or the new one.

Two files cannot be replaced in one step, so the config names the sha256 of its weights and the steps are: both files
under temporary names, on disk; the config as NEXT; the weights in place; NEXT in place of the config. A reader whose
config does not fit the weights looks at NEXT. The next save finishes or drops what a killed one left behind.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import fnmatch
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from molora.adapter.card_section import after_save
from molora.adapter.safetensors_file import TensorFile, write_tensors
from molora.adapter.strict_json import open_regular, read_object
from molora.errors import AdapterError, CheckpointError

__all__ = ["CARD", "CONFIG", "CONFIG_LIMIT", "NEXT", "WEIGHTS", "edit_card", "save_folder", "signature"]

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"
NEXT = ".adapter_config.next.json"
CONFIG_LIMIT = 2 << 20  # bytes; a site takes about 230, so 9,000 adapted modules; hostile JSON of this size costs 50 MB
HEADER_LIMIT = 16 << 20  # bytes, for files that we wrote ourselves
TEMPORARY = ".molora-{}.tmp"
FOREIGN = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "adapter_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems


def save_folder(
    folder: Path, *, peft_type: str, tensors: Mapping[str, Tensor], describe: Callable[[str], str], card: str | None
) -> None:
    """Write weights, ``describe(sha256 of the weights)`` as the config, and the card. See the module's text.

    Raises:
        CheckpointError: when the folder belongs to something else, or cannot be written; what was there still is.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder) as directory:
            _refuse_foreign(folder, peft_type)
            _finish(folder)
            with _temporaries(folder):
                sha256 = ""

                def weights(file: BinaryIO) -> None:
                    nonlocal sha256
                    sha256 = write_tensors(file, tensors)

                new_weights = _stage(folder, WEIGHTS, weights)
                config = describe(sha256).encode()
                if len(config) > CONFIG_LIMIT:
                    raise CheckpointError(
                        f"{folder}: the config takes {len(config):,} bytes, expected at most {CONFIG_LIMIT:,}"
                    )
                new_config = _stage(folder, CONFIG, lambda file: file.write(config))
                os.replace(new_config, folder / NEXT)
                os.fsync(directory)
                os.replace(new_weights, folder / WEIGHTS)
                os.fsync(directory)
                os.replace(folder / NEXT, folder / CONFIG)
                if card is not None:
                    _replace_card(folder, after_save(_card(folder), card, sha256))
                os.fsync(directory)
    except OSError as e:
        raise CheckpointError(
            f"{folder}: could not be saved ({e}); an adapter that was there before is unharmed. "
            "Check the path, the free space and your rights there, and save again"
        ) from e


def edit_card(folder: Path, edit: Callable[[str], str]) -> None:
    """Replace the folder's README.md, empty where there is none, by what ``edit`` makes of it; nobody saves meanwhile.

    Raises:
        AdapterError: when it is not a plain file.
        CheckpointError: when it cannot be written. What ``edit`` raises passes; the file then is as it was.
    """
    try:
        with _locked(folder) as directory, _temporaries(folder):
            with contextlib.suppress(FileNotFoundError):
                os.close(open_regular(folder / CARD))
            _replace_card(folder, edit(_card(folder) or ""))
            os.fsync(directory)
    except OSError as e:
        raise CheckpointError(f"{folder / CARD}: could not be written ({e}); it is as it was") from e


def signature(folder: Path) -> tuple[object, ...]:
    """Changes whenever a save has replaced one of the folder's files."""
    out: list[object] = []
    for name in (CONFIG, NEXT, WEIGHTS):
        try:
            s = os.lstat(folder / name)
            out.append((s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns))
        except OSError:
            out.append(None)
    return tuple(out)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The folder's descriptor, with the lock that keeps a second writer waiting; a killed writer loses it at once."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
        except OSError as e:
            if e.errno not in NO_LOCKS:
                raise
        yield directory
    finally:
        os.close(directory)


@contextlib.contextmanager
def _temporaries(folder: Path) -> Iterator[None]:
    """Removes the temporary files before (those of a killed save) and after."""

    def remove() -> None:
        for name in (WEIGHTS, CONFIG, CARD):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(folder / TEMPORARY.format(name))

    remove()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            remove()


def _stage(folder: Path, name: str, write: Callable[[BinaryIO], object]) -> Path:
    """Write a temporary file, wholly on disk when this returns."""
    path = folder / TEMPORARY.format(name)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return path


def _refuse_foreign(folder: Path, peft_type: str) -> None:
    names = sorted(os.listdir(folder))
    found = [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in FOREIGN)]
    if WEIGHTS in names and CONFIG not in names and NEXT not in names:
        found.append(WEIGHTS)
    if CONFIG in names:
        try:
            kind = read_object(folder / CONFIG, CONFIG_LIMIT).get("peft_type")
        except AdapterError as e:
            raise CheckpointError(f"{folder}: not saved over a config that cannot be read: {e}") from e
        if kind != peft_type:
            found.append(f"{CONFIG} of peft_type {kind!r}")
    if found:
        raise CheckpointError(
            f"{folder}: holds {', '.join(found)}, which this save did not make; expected an empty folder or an earlier "
            f"{peft_type} adapter. Save into a folder of its own"
        )


def _finish(folder: Path) -> None:
    """Complete a save that was killed after its weights were in place; drop one that was killed before."""
    try:
        wanted = read_object(folder / NEXT, CONFIG_LIMIT).get("sha256")
        if wanted == TensorFile(folder / WEIGHTS, header_limit=HEADER_LIMIT).sha256():
            os.replace(folder / NEXT, folder / CONFIG)
            return
    except FileNotFoundError:
        pass
    except AdapterError:
        pass  # damaged: the save that follows replaces it
    with contextlib.suppress(FileNotFoundError):
        os.unlink(folder / NEXT)


def _card(folder: Path) -> str | None:
    """The README.md that is there; bytes that are no UTF-8 come back as they were when it is written."""
    try:
        return (folder / CARD).read_text(encoding="utf-8", errors="surrogateescape")
    except FileNotFoundError:
        return None


def _replace_card(folder: Path, text: str) -> None:
    data = text.encode("utf-8", "surrogateescape")
    os.replace(_stage(folder, CARD, lambda file: file.write(data)), folder / CARD)
