"""Arguments of the training job: transformers' own and four groups of ours, from one YAML file and flags."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser

from molora.data.records import source
from molora.errors import ConfigError, nearest
from molora.extras import missing
from molora.training.engine.settings import check_engine, prepare_engine, world_size
from molora.training.settings import TrainingArguments
from molora.training.yaml_values import parse_yaml, read_yaml

__all__ = ["OWN_GROUPS", "Arguments", "DataArguments", "MixtureArguments", "ModelArguments", "PlanArguments"]
__all__ += ["read_arguments"]


def _field(default: Any, text: str) -> Any:
    """A dataclass field with its help text; mappings get a fresh empty one."""
    if isinstance(default, dict):
        return field(default_factory=dict, metadata={"help": text})
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    """The base model."""

    model_name_or_path: str = _field(
        "builtin:smollm2", "Folder of the base model and its tokenizer, or builtin:smollm2."
    )
    dtype: str = _field(
        "bfloat16", "Type of the frozen base: bfloat16, float32, float16. The adapters stay in float32."
    )
    model_task: str = _field(
        "auto",
        "What the model is: causal-lm; sequence-classification (a 'label' for each 'text'; a new head trains and is "
        "saved whole, as modules_to_save are); image-text-to-text (an 'image' with 'messages'); auto: see the folder.",
    )


@dataclass
class MixtureArguments:
    """The mixture that is put on it."""

    recipe: str = field(metadata={"help": "Name of a recipe; `molora info` lists them."})
    options: dict[str, Any] = _field({}, "The recipe's options, as in convert(): {num_experts: 8, top_k: 2, r: 4}.")


@dataclass
class DataArguments:
    """The domains."""

    domains: dict[str, Any] = _field(
        {},
        "Name to data: a file of JSON lines ('text' or 'messages' on every line; .gz too), .parquet, .txt (blank lines "
        "part the records), a folder of these, hf:name[:config][:split] for load_dataset (split: train), or "
        "builtin:<domain>. {path: ..., text_column: ...} for other columns; likewise messages, label, image, group.",
    )
    heldout_domains: dict[str, Any] = _field({}, "Name to data that is held out; else a part of each domain is.")
    task_of_domain: dict[str, str] = _field(
        {}, "For recipes with a supervised loss: domain to adapter; a domain with an adapter's name needs none."
    )
    weights: dict[str, float] = _field({}, "Name to share of the training rows; 1 when not given.")
    max_length: int = _field(128, "Tokens in a row; longer texts become several rows (a classifier's are cut).")
    packing: bool = _field(
        False,
        "Put several short texts into a row of max_length tokens, each as if alone. A batch is laid end to end, "
        "so take per_device_train_batch_size 1 and a longer max_length. Balance losses see one row.",
    )
    global_batch_size: int = _field(
        0, "Rows of one step on all processes together: computes gradient_accumulation_steps; 0 leaves that to you."
    )
    train_examples: int = _field(0, "Training rows of all domains together; 0 takes what there is.")
    heldout: float = _field(0.1, "Part of each domain to hold out: a share below 1, or a number of records.")


@dataclass
class PlanArguments:
    """What a dry run takes for granted where a file is not here yet; a training run never reads it."""

    assumed_adapters: dict[str, Any] = _field(
        {}, "For --dry-run: options of recipe lora for ready-made adapters whose folders are not here."
    )
    assumed_rows: int = _field(0, "For --dry-run: training rows where the data are not here; 0: not known.")


@dataclass(frozen=True)
class Arguments:
    """Everything that one training run is made of."""

    model: ModelArguments
    mixture: MixtureArguments
    data: DataArguments
    training: TrainingArguments

    given: tuple[str, ...] = ()
    plan: PlanArguments = field(default_factory=PlanArguments)

    def chosen(self) -> dict[str, Any]:
        """What makes the run, as plain values: our own arguments, and those of transformers that were given."""
        own = {k: v for part in (self.model, self.mixture, self.data) for k, v in dataclasses.asdict(part).items()}
        theirs = {f.name for f in dataclasses.fields(TrainingArguments)}
        return own | {k: _plain(getattr(self.training, k)) for k in self.given if k in theirs}


OUTPUT = "runs/train"  # where results go when the arguments do not say
OWN_GROUPS = (ModelArguments, MixtureArguments, DataArguments, PlanArguments)


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)  # transformers' enumerations


class _Parser(HfArgumentParser):
    """HfArgumentParser that raises instead of printing the usage of a hundred arguments."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message.removeprefix("argument "))


def read_arguments(config: Path | str | None, overrides: Sequence[str] = ()) -> Arguments:
    """Read a YAML file of arguments, then ``--key value`` overrides; ``--options.r 8`` reaches into a mapping.

    Raises:
        ConfigError: file missing or not a mapping, unknown name (with the nearest), value of a wrong type.
    """
    values: dict[str, Any] = {"output_dir": OUTPUT, "use_cpu": not torch.accelerator.is_available()}
    values["ddp_find_unused_parameters"] = False  # packed experts: every one gets a gradient in every step
    values |= read_yaml(Path(config)) if config is not None else {}
    known = {f.name: f for group in (*OWN_GROUPS, TrainingArguments) for f in dataclasses.fields(group) if f.init}
    for key, value in _pairs(overrides):
        _set(values, key, value)
    where = f"{config}: " if config is not None else ""
    for key in values:
        if key not in known:
            raise ConfigError(f"{where}unknown argument {key!r}{nearest(str(key), known)}")
    return _parse(prepare_engine({"dtype": ModelArguments.dtype, **values}), where)


def _parse(values: Mapping[str, Any], where: str) -> Arguments:
    groups: list[Any] = [*OWN_GROUPS, TrainingArguments]
    parser = _Parser(groups, allow_abbrev=False)
    flags: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping | list):
            parser.set_defaults(**{key: value})
        elif value is not None:
            flags.append(f"--{key}={value}")
    mappings = {f.name for group in OWN_GROUPS for f in dataclasses.fields(group) if f.default_factory is dict}
    for name in mappings & values.keys():
        if not isinstance(values[name], Mapping):
            raise ConfigError(f"{where}{name}: got {values[name]!r}, expected a mapping (name: value)")
    try:
        model, mixture, data, plan, training = parser.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
    except ImportError as e:
        raise missing(f"accelerate ({e})", "train", f"{where}training") from e
    except (ValueError, TypeError) as e:
        raise ConfigError(f"{where}{e}") from e
    check_engine(training, values.get("deepspeed"), world_size())
    faults = _faults(data)
    if faults:
        raise ConfigError(f"{where}" + "; ".join(faults))
    return Arguments(model, mixture, data, training, tuple(values), plan)


def _faults(data: DataArguments) -> list[str]:
    out = [] if data.domains else ["domains: got none, expected at least one, as name: file.jsonl"]
    for key in ("domains", "heldout_domains"):
        for name, value in getattr(data, key).items():
            try:
                source(value)
            except ConfigError as e:
                out.append(f"{key}: {name}: {e}")
    for key in ("heldout_domains", "weights", "task_of_domain"):
        known: dict[str, Any] = data.domains
        out += [f"{key}: {n!r} is not a domain{nearest(str(n), known)}" for n in getattr(data, key) if n not in known]
    out += [
        f"task_of_domain: {n}: got {a!r}, expected the name of an adapter"
        for n, a in data.task_of_domain.items()
        if not isinstance(a, str)
    ]
    for n, w in data.weights.items():
        if isinstance(w, bool) or not isinstance(w, int | float) or w <= 0:
            out.append(f"weights: {n}: got {w!r}, expected a number above 0")
    for key, low in (("max_length", 8), ("train_examples", 0), ("global_batch_size", 0)):
        if getattr(data, key) < low:
            out.append(f"{key}: got {getattr(data, key)}, expected at least {low}")
    return out if data.heldout > 0 else [*out, f"heldout: got {data.heldout}, expected a share or a number above 0"]


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """``--key value`` and ``--key=value`` as pairs; a flag by itself is ``true``."""
    pairs, rest = [], list(overrides)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise ConfigError(f"got {flag!r}, expected --argument value")
        key, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        head, dot, tail = key.partition(".")
        pairs.append((head.replace("-", "_") + dot + tail, value))
    return pairs


def _set(values: dict[str, Any], key: str, text: str) -> None:
    """Put one override into the values; a mapping may be given whole, as YAML."""
    head, dot, tail = key.partition(".")
    if dot:
        inner = values.get(head) or {}
        values[head] = {**inner, tail: parse_yaml(text, f"--{key}")} if isinstance(inner, Mapping) else inner
    else:
        values[head] = parse_yaml(text, f"--{key}") if text.startswith(("{", "[")) else text
