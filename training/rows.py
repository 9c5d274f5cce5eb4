"""The rows of a training job: every domain read, split and tokenised, mixed, packed, each with its domain's expert."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from molora.config import MoloraConfig
from molora.data.builtin.domains import domain_records
from molora.data.examples import Example, apart, encode, encode_class, split
from molora.data.packing import pack
from molora.data.records import Record, source
from molora.data.sources import FAULTS_SHOWN
from molora.errors import ConfigError, nearest
from molora.routers import BALANCES
from molora.training.arguments import DataArguments
from molora.training.images import ImageRows, encode_image
from molora.training.mixing import mix
from molora.training.models import CAUSAL, CLASSES, IMAGES

__all__ = ["Data", "coder", "divided", "prepare_data", "supervised_experts"]

NEEDS = {CAUSAL: (), CLASSES: ("label",), IMAGES: ("image",)}
NO_EXPERT = -100  # a task id that the supervised loss leaves out


@dataclass(frozen=True)
class Data:
    """Rows to train on (all domains, shuffled) and, per domain, the held-out records and their rows.

    ``labels``: the classes of a classifier, by their number.
    """

    train: Sequence[Example]
    heldout: Mapping[str, Sequence[Example]]
    heldout_records: dict[str, list[Record]]
    train_records: dict[str, int]
    labels: tuple[str, ...] = ()


def supervised_experts(config: MoloraConfig, arguments: DataArguments) -> dict[str, int] | None:
    """Which expert each domain's rows teach the routers to choose, by domain; None without a supervised loss.

    A domain belongs to the adapter of its name, or to that which ``task_of_domain`` says; rows of others teach nothing.
    Experts that are no adapters have numbers for names: "0", "1", ...

    Raises:
        ConfigError: no domain belongs to an adapter, an unknown adapter, or ``task_of_domain`` where nothing uses it.
    """
    names, own = [n for n, _ in config.adapters] or _numbers(config), arguments.task_of_domain
    if not any(BALANCES[b.kind].needs_tasks for p in config.placements for b in p.balance):
        if own:
            raise ConfigError(f"task_of_domain: recipe {config.recipe!r} with these options has no supervised loss")
        return None
    what = "adapter" if config.adapters else "expert"
    unknown = [f"{d}: no {what} {a!r}{nearest(a, names)}" for d, a in own.items() if a not in names]
    if unknown:
        raise ConfigError(f"task_of_domain: {'; '.join(unknown)}; there is {', '.join(names)}")
    experts = {d: names.index(own.get(d, d)) if own.get(d, d) in names else NO_EXPERT for d in arguments.domains}
    if set(experts.values()) == {NO_EXPERT}:
        raise ConfigError(
            f"got the domains {', '.join(experts)} and the {what}s {', '.join(names)}, expected equal names: the "
            f"supervised loss teaches each domain its {what}; rename them, or say task_of_domain: {{domain: {what}}}"
        )
    return experts


def _numbers(config: MoloraConfig) -> list[str]:
    """The experts that all layers have, by number."""
    counts = [p.r if p.rank_one else p.num_experts for p in config.placements]
    return [str(e) for e in range(min(min(c) if isinstance(c, tuple) else c for c in counts))]


def prepare_data(
    arguments: DataArguments,
    encoder: Any,
    seed: int,
    task: str = CAUSAL,
    experts: Mapping[str, int] | None = None,
    known: Sequence[str] = (),
) -> Data:
    """Read, split and tokenise every domain, and mix the training rows. Depends on its arguments only.

    Args:
        encoder: the tokenizer, or a vision-language model's processor.
        experts: what :func:`supervised_experts` says; then rows have ``task_ids``.
        known: the classes that a classifier has learned already.

    Raises:
        ConfigError: a file that is missing, bad or too small; a domain without a single usable row.
    """
    if arguments.packing and task != CAUSAL:
        raise ConfigError(f"packing: got model_task {task}, expected {CAUSAL}: other rows cannot share one")
    read = _read(arguments, NEEDS[task])
    labels = _classes([r for own in read.values() for side in own for r in side], known) if task == CLASSES else {}
    sides = {name: _sides(name, own, arguments.heldout, seed) for name, own in read.items()}
    coded = coder(task, encoder, arguments.max_length, labels)
    train: dict[str, list[Example]] = {}
    heldout: dict[str, list[Example]] = {}
    for name, (learn, held) in sides.items():
        train[name] = [row for r in learn for row in coded(r)]
        heldout[name] = [row for r in held for row in coded(r)]
        if not train[name] or not heldout[name]:
            side = "held-out" if train[name] else "training"
            raise ConfigError(
                f"domain {name!r} ({source(arguments.domains[name]).path}): no {side} row has a token to learn within "
                f"{arguments.max_length} tokens; raise max_length"
            )
        for row in train[name]:
            row["domain"] = name
    rows = mix(train, arguments.weights, arguments.train_examples, seed)
    for row in rows if experts else ():
        row["task_ids"] = (experts or {})[row["domain"]]
    rows = pack(rows, arguments.max_length) if arguments.packing else rows
    seen = (lambda own: ImageRows(own, encoder)) if task == IMAGES else (lambda own: own)
    return Data(
        seen(rows),
        {n: seen(own) for n, own in heldout.items()},
        {n: held for n, (_, held) in sides.items()},
        {n: len(learn) for n, (learn, _) in sides.items()},
        tuple(dict.fromkeys(str(name) for name in known or labels)),
    )


def divided(arguments: DataArguments, seed: int, task: str = CAUSAL) -> dict[str, tuple[list[Record], list[Record]]]:
    """Every domain's records as (to train on, held out), nothing on both sides.

    Raises:
        ConfigError: a file that is missing, bad or too small; all bad files are named at once.
    """
    read = _read(arguments, NEEDS[task])
    return {name: _sides(name, own, arguments.heldout, seed) for name, own in read.items()}


def _read(arguments: DataArguments, needs: Sequence[str]) -> dict[str, list[list[Record]]]:
    """Each domain's records, and those of its held-out source if it has one; all bad files are named at once."""
    read, faults = dict[str, list[list[Record]]](), list[str]()
    for name, value in arguments.domains.items():
        sources = [value, *(v for n, v in arguments.heldout_domains.items() if n == name)]
        try:
            read[name] = [domain_records(v, needs) for v in sources]
        except ConfigError as e:
            faults.append(f"domain {name!r}: {e}")
    if faults:
        raise ConfigError("\n".join(faults))
    return read


def _sides(name: str, read: list[list[Record]], heldout: float, seed: int) -> tuple[list[Record], list[Record]]:
    records, *own = read
    try:
        return apart(records, own[0]) if own else split(records, heldout, seed)
    except ConfigError as e:
        raise ConfigError(f"domain {name!r}: {e}") from e


def coder(
    task: str, encoder: Any, max_length: int, labels: Mapping[str | int, int]
) -> Callable[[Record], list[Example]]:
    """What makes rows of a record: by tokenizer, or by a vision-language model's processor.

    ``labels``: a classifier's classes by name.
    """

    def coded(record: Record) -> list[Example]:
        if task == CLASSES and record.label is not None:
            return [encode_class(record, encoder, max_length, labels[record.label])]
        if task != IMAGES:
            return encode(record, encoder, max_length)
        if record.messages:
            return encode_image(record, encoder, max_length)
        if record.image:
            raise ConfigError(f"{record.where}: an image needs 'messages' that ask and answer; got 'text'")
        return encode(record, encoder.tokenizer, max_length)

    return coded


def _classes(records: Sequence[Record], known: Sequence[str]) -> dict[str | int, int]:
    """Number of each label, in order of the numbers: labels sorted, or as the classifier has them already.

    Raises:
        ConfigError: fewer than two, one that the classifier does not have, or a record that is no text.
    """
    faults = [f"{r.where}: a classifier reads 'text', got 'messages'" for r in records if r.messages]
    found = {r.label: r for r in reversed(records) if r.label is not None}
    ordered = sorted(found, key=lambda v: v if isinstance(v, int) else 0)
    if not all(isinstance(v, int) for v in found):
        ordered = sorted(found, key=str)
    numbers = {label: i for i, label in enumerate(ordered)}
    if known:
        numbers = {v: list(known).index(str(v)) for v in ordered if str(v) in known}
        numbers |= {v: v for v in ordered if isinstance(v, int) and v not in numbers and v in range(len(known))}
        faults += [
            f"{found[v].where}: label {v!r}, expected one of the model's: {', '.join(known)}{nearest(str(v), known)}"
            for v in ordered
            if v not in numbers
        ]
    elif len(ordered) < 2:
        faults.append(f"got the labels {ordered}, expected at least two: a classifier has nothing else to learn")
    if faults:
        raise ConfigError("\n".join(faults[:FAULTS_SHOWN]))
    return numbers
