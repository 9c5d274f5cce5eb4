"""The engine that trains: DeepSpeed's settings found and checked, and the environment made ready for it.

What cannot work is refused before a model is loaded; much of it would otherwise train something else and not say so.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from molora.errors import ConfigError, nearest
from molora.extras import package_folder

__all__ = ["check_engine", "prepare_cpu_engine", "prepare_engine", "resolve_deepspeed", "world_size"]

ZERO = Path(__file__).parents[1] / "zero"
# DeepSpeed's name of a setting: TrainingArguments' name of the same.
SHARED = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
}
# What a JSON leaves out. Without a value, DeepSpeed neither clips nor casts, whatever the arguments say.
COMPLETED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
BUILT_OPTIMIZERS = ("adam", "adamw", "lamb", "lion", "onebitadam", "onebitlamb", "zerooneadam")


def world_size() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def resolve_deepspeed(value: Any) -> dict[str, Any] | None:
    """DeepSpeed's settings by the name of a shipped file (``zero2``), by the path of a JSON file, or as a mapping.

    Batch sizes, clipping and precision that they leave out become ``"auto"``: the values of the arguments.

    Raises:
        ConfigError: neither a name nor a file, or a file that is not a JSON object.
    """
    if value is None or value == "":
        return None
    settings = dict(value) if isinstance(value, Mapping) else _read_json(value)
    settings |= {key: "auto" for key in COMPLETED if key not in settings}
    return settings | {key: {"enabled": "auto"} for key in ("bf16", "fp16") if key not in settings}


def _read_json(value: Any) -> dict[str, Any]:
    shipped = {path.stem: path for path in sorted(ZERO.glob("*.json"))}
    path = shipped.get(str(value), Path(str(value)))
    if not path.is_file():
        known = ", ".join(shipped)
        raise ConfigError(
            f"deepspeed: got {value!r}, expected {known} or the path of a JSON file{nearest(str(value), shipped)}"
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ConfigError(f"deepspeed: {path} is not JSON: {e}") from e
    if not isinstance(settings, dict):
        raise ConfigError(
            f"deepspeed: {path}: got {type(settings).__name__}, expected an object of DeepSpeed's settings"
        )
    return settings


def prepare_engine(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with DeepSpeed's settings in place and ``gradient_accumulation_steps`` for the global batch size.

    Must run before TrainingArguments are built, which start the process group; it makes the environment ready for that.

    Raises:
        ConfigError: settings that cannot work here, with the reason and what to do.
    """
    values, world = dict(values), world_size()
    settings = resolve_deepspeed(values.get("deepspeed"))
    no_device = not torch.accelerator.is_available()
    if no_device and world > 1 and not _is_true(values.get("use_cpu", True)):
        raise ConfigError(f"use_cpu: got false, but no GPU is seen here, and {world} processes would each train alone")
    values |= _accumulation(values, world)
    if no_device:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed where it is installed
    if settings is None:
        if _is_true(os.environ.get("ACCELERATE_USE_DEEPSPEED")):
            raise ConfigError(
                "deepspeed: accelerate's own configuration asks for DeepSpeed; take it out there and give it as an "
                "argument, where it is checked: --deepspeed zero2, or the path of the JSON file"
            )
        return values
    package_folder("deepspeed", "deepspeed", "train", "deepspeed=")
    _refuse(settings)
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)  # DeepSpeed's calls
    values |= _base_type(values, settings) | {"deepspeed": settings}
    if "RANK" not in os.environ:
        _world_of_one()
    if no_device:
        prepare_cpu_engine()
    return values


def _is_true(value: Any) -> bool:
    """As transformers and accelerate read flags and environment variables."""
    return str(value).lower() in ("true", "1", "yes", "y", "on", "t")


def _accumulation(values: Mapping[str, Any], world: int) -> dict[str, int]:
    """``gradient_accumulation_steps`` that give the global batch size asked for; nothing if none is."""
    default = TrainingArguments.per_device_train_batch_size
    try:
        wanted = int(values.get("global_batch_size") or 0)
        micro = int(values.get("per_device_train_batch_size") or default)
    except (TypeError, ValueError):  # the parser of the arguments says what is wrong with them
        return {}
    if wanted == 0:
        return {}
    if "gradient_accumulation_steps" in values:
        raise ConfigError("global_batch_size and gradient_accumulation_steps: got both; the first computes the second")
    at_once = micro * world
    if wanted < 0 or wanted % at_once:
        near = sorted({max(1, wanted // at_once) * at_once, (max(0, wanted) // at_once + 1) * at_once})
        raise ConfigError(
            f"global_batch_size: got {wanted}, expected a multiple of {at_once}: {micro} rows "
            f"(per_device_train_batch_size) x {world} processes; take {' or '.join(map(str, near))}"
        )
    return {"gradient_accumulation_steps": wanted // at_once}


def _base_type(values: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, bool]:
    """The flag that keeps the base's ``dtype`` under ZeRO-3, which otherwise loads every base in float32."""
    if _at(settings, "zero_optimization.stage") != 3:
        return {}
    wanted = {"bf16": values.get("dtype") == "bfloat16", "fp16": values.get("dtype") == "float16"}
    for flag, value in wanted.items():
        if flag in values and _is_true(values[flag]) != value:
            raise ConfigError(
                f"{flag}: got {values[flag]}, but ZeRO-3 loads the base in the type that bf16 and fp16 name, and dtype "
                f"is {values.get('dtype')}; leave {flag} out, or change dtype"
            )
    return {flag: True for flag, value in wanted.items() if value}


def _refuse(settings: Mapping[str, Any]) -> None:
    """Raise for what DeepSpeed would do wrong, silently or with an error from deep inside."""
    if (_at(settings, "tensor_parallel.autotp_size") or 0) > 1:
        raise ConfigError(
            "deepspeed: tensor_parallel.autotp_size is set, but AutoTP cuts the frozen linears of the adapted modules "
            "and not their experts, whose widths then no longer fit; drop the section (zero3 shards a large base)"
        )
    if _at(settings, "expert_parallel.enabled"):
        raise ConfigError(
            "deepspeed: expert_parallel is enabled, but AutoEP exchanges the base's expert blocks for its own and "
            "knows nothing of adapters on them; drop the section (zero3 shards a large base)"
        )
    if _is_true(os.environ.get("ACCELERATE_USE_CPU")):
        raise ConfigError(
            "deepspeed: with the environment variable ACCELERATE_USE_CPU, accelerate trains without DeepSpeed and does "
            "not say so; unset it (`use_cpu: true` in the arguments is enough, and the default without a GPU)"
        )
    what, instead = _built(settings)
    missing = [tool for tool in ("ninja", os.environ.get("CXX", "g++")) if shutil.which(tool) is None]
    if what and missing:
        raise ConfigError(
            f"deepspeed: for {what} it builds C++ code, and {' and '.join(missing)} cannot be found on PATH; "
            f"pip install ninja and install g++, or {instead}"
        )


def _built(settings: Mapping[str, Any]) -> tuple[str, str]:
    """What makes DeepSpeed compile an optimizer, and what to write instead; two empty strings if nothing does."""
    name = str(_at(settings, "optimizer.type") or "")
    if name.lower() in BUILT_OPTIMIZERS and not _at(settings, "optimizer.params.torch_adam"):
        torch_adam = ', or set "torch_adam": true in its params' if name.lower() in ("adam", "adamw") else ""
        return f"the optimizer {name} of the JSON", f"drop that section and use `optim`{torch_adam}"
    device = _at(settings, "zero_optimization.offload_optimizer.device")
    if not name and device not in (None, "none") and settings.get("zero_force_ds_cpu_optimizer", True):
        return "offload_optimizer", 'set "zero_force_ds_cpu_optimizer": false'
    return "", ""


def _at(settings: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted path; None where there is none."""
    value: Any = settings
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def prepare_cpu_engine() -> None:
    """Start DeepSpeed's processes on a machine without a GPU: over gloo, and without building anything."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    # Shared memory between processes: a C++ build of a minute, under a lock that an interrupted build leaves behind.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # accelerate does this on GPUs only; a base that is sharded while it is loaded needs to know the processes.
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)


def _world_of_one() -> None:
    """What a launcher would set for a single process: DeepSpeed asks for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def check_engine(arguments: TrainingArguments, settings: Mapping[str, Any] | None, world: int) -> None:
    """Compare the numbers of DeepSpeed's settings with the arguments and with the processes that there are.

    Raises:
        ConfigError: all that differ, with what to do.
    """
    if settings is None:
        return
    pairs = [(key, _at(settings, key), name, getattr(arguments, name)) for key, name in SHARED.items()]
    faults = [f"{k} is {a} but {n} is {b}" for k, a, n, b in pairs if a not in (None, "auto") and a != b]
    micro, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    total = settings.get("train_batch_size", "auto")
    if total not in (None, "auto", micro * steps * world):
        fits = isinstance(total, int) and total % (micro * world) == 0
        fix = f"gradient_accumulation_steps {total // (micro * world)} gives it" if fits else "no accumulation gives it"
        faults.append(
            f"train_batch_size is {total} but {micro} rows x {steps} accumulated x {world} processes are "
            f"{micro * steps * world} ({fix})"
        )
    if faults:
        raise ConfigError(f'deepspeed: {"; ".join(faults)}; write "auto" in the JSON, and the number as an argument')
