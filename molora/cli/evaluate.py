"""The evaluation job: an adapter and the data of several domains -> sections of an evaluation document."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from molora.adapter.folder import Adapter, read_adapter
from molora.data.builtin.domains import domain_records, score_answer
from molora.data.examples import Example, drawn
from molora.data.records import Record
from molora.errors import ConfigError
from molora.eval.ablation.section import ablate
from molora.eval.counting.domains import check_choice, record_domains, token_texts
from molora.eval.counting.experts import expert_report
from molora.eval.counting.summary import summary
from molora.eval.document import FILE, add_sections
from molora.eval.ledger import Ledger, Track, quiet
from molora.eval.scoring.choices import read_choices
from molora.eval.scoring.section import scores
from molora.load import load
from molora.training.arguments import ModelArguments, read_arguments
from molora.training.images import ImageRows
from molora.training.models import CLASSES, IMAGES, load_base, load_processor, load_tokenizer, task_of
from molora.training.rows import coder, divided

__all__ = ["Evaluation", "EvaluationArguments"]

LOG = "train_log.json"  # beside the adapter, where `molora train` leaves it


@dataclass(frozen=True)
class EvaluationArguments:
    """What is evaluated, on what, and where the results go.

    ``adapter``: its folder. ``domains``: name to data, as ``molora train`` takes them, all of it; or ``config``, the
    YAML file of a training run, whose held-out records are taken. ``base``: where the adapter's own name for it is of
    no use here. ``documents``: at most so many a domain, drawn by their text; 0 takes all.
    """

    adapter: Path
    domains: Mapping[str, str]
    out: Path
    config: Path | None = None
    base: str = ""
    name: str = ""
    documents: int = 64
    max_length: int = 256
    batch_size: int = 8
    dtype: str = "bfloat16"
    seed: int = 0

    def check(self) -> None:
        """Raise a :class:`ConfigError` for what cannot be right, before anything is loaded."""
        if bool(self.domains) == (self.config is not None):
            got = "both --domain and --config" if self.domains else "no data"
            raise ConfigError(
                f"got {got}, expected --domain NAME=FILE, once for each domain, or --config with the YAML file of the "
                "training run, whose held-out data it then takes"
            )
        for key, low in (("documents", 0), ("max_length", 8), ("batch_size", 1)):
            if getattr(self, key) < low:
                raise ConfigError(f"--{key.replace('_', '-')}: got {getattr(self, key)}, expected at least {low}")


class Evaluation:
    """One adapter on one set of data. Reads the data first, then loads the model, and that only when it is needed.

    ``records`` by domain and ``model``: where the caller has them already; they must be those of the arguments.
    """

    def __init__(
        self,
        arguments: EvaluationArguments,
        track: Track = quiet,
        records: Mapping[str, Sequence[Record]] | None = None,
        model: PreTrainedModel | None = None,
    ) -> None:
        if records is None:
            arguments.check()
        self.arguments, self.track, self._given = arguments, track, model
        self.adapter: Adapter = read_adapter(arguments.adapter)
        base = arguments.base or str(self.adapter.fingerprint.get("base_model_name_or_path") or "")
        if not base:
            raise ConfigError(f"{arguments.adapter}: names no base model; say where it is with --base")
        self._model_arguments = ModelArguments(model_name_or_path=base, dtype=arguments.dtype)
        self._task = task_of(self._model_arguments)
        if self._task == CLASSES:
            raise ConfigError(
                f"{base}: is a classifier; the command line evaluates models that write text. In Python, "
                "molora.eval.counting.watch.collect_routing records any model"
            )
        self.tokenizer = load_tokenizer(self._model_arguments)
        read = self._records() if records is None else records
        self.records = {name: drawn(own, arguments.documents, arguments.seed) for name, own in read.items()}
        self.documents = self._documents()
        self.file = arguments.out / FILE

    def _records(self) -> dict[str, list[Record]]:
        a = self.arguments
        if a.config is not None:
            run = read_arguments(a.config)
            sides = divided(run.data, run.training.seed, self._task)
            return {name: held for name, (_, held) in sides.items()}
        needs = ("image",) * (self._task == IMAGES)
        return {name: domain_records(value, needs) for name, value in a.domains.items()}

    def _documents(self) -> dict[str, list[Sequence[Example]]]:
        encoder = load_processor(self._model_arguments) if self._task == IMAGES else self.tokenizer
        coded = coder(self._task, encoder, self.arguments.max_length, {})
        out: dict[str, list[Sequence[Example]]] = {}
        for name, records in self.records.items():
            found = [rows for rows in map(coded, records) if rows]
            if not found:
                raise ConfigError(
                    f"domain {name!r}: no record has a token to look at within {self.arguments.max_length} tokens"
                )
            out[name] = [ImageRows(rows, encoder) if self._task == IMAGES else rows for rows in found]
        return out

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base with the adapter on it, in eval mode."""
        if self._given is not None:
            given: PreTrainedModel = self._given
            given.eval()
            return given
        where = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        model: Any = load(load_base(self._model_arguments), self.arguments.adapter)
        placed: PreTrainedModel = model.eval().to(where)
        return placed

    @property
    def pad(self) -> int:
        """What rows are filled up with."""
        return int(self.tokenizer.pad_token_id or 0)

    @property
    def expert_names(self) -> list[str] | None:
        """The adapters that the experts came from."""
        return [name for name, _ in self.adapter.config.adapters] or None

    def routing(self, samples: int = 8, intruders: bool = False) -> dict[str, Any]:
        """Sections "routing" and "experts", and the Trainer's log if it lies beside the adapter."""
        check_choice(self.model)

        def found(ledger: Ledger) -> dict[str, Any]:
            stats = record_domains(
                self.model, self.documents, self.pad, seed=self.arguments.seed, size=self.arguments.batch_size,
                samples=samples, ledger=ledger, track=self.track,
            )  # fmt: skip
            experts = expert_report(self.model, first=10 if intruders else 0)
            out = {"routing": summary(stats, self.arguments.seed), "experts": experts}
            log = self.arguments.adapter / LOG
            return out | ({"training": json.loads(log.read_text(encoding="utf-8"))} if log.is_file() else {})

        return self._add("routing", {"samples": samples}, found)

    def score(self, choices: Mapping[str, str]) -> dict[str, Any]:
        """Section "scores"; ``choices``: name to a file of questions."""
        asked = {name: read_choices(path) for name, path in choices.items()}

        def found(ledger: Ledger) -> dict[str, Any]:
            a = self.arguments
            return {
                "scores": scores(
                    self.model, self.tokenizer, domains=self.records, choices=asked, scorer=score_answer,
                    max_length=a.max_length, size=a.batch_size, seed=a.seed, ledger=ledger, track=self.track,
                )
            }  # fmt: skip

        return self._add("scores", {"choices": dict(choices)}, found)

    def ablate(self, each: str) -> dict[str, Any]:
        """Section "ablation"; ``each``: which experts are taken away one by one."""

        def found(ledger: Ledger) -> dict[str, Any]:
            rows = {name: [row for rows in own for row in rows] for name, own in self.documents.items()}
            return {
                "ablation": ablate(
                    self.model, rows, self.pad, each=each, expert_names=self.expert_names, seed=self.arguments.seed,
                    size=self.arguments.batch_size, ledger=ledger, track=self.track,
                )
            }  # fmt: skip

        return self._add("ablation", {"each": each}, found)

    def _add(self, what: str, options: Mapping[str, Any], make: Callable[[Ledger], dict[str, Any]]) -> dict[str, Any]:
        """Make sections, going on from what an interrupted run left, and put them into the document."""
        provenance = self.provenance()
        ledger = Ledger(self.file.with_name(f".{what}.progress"), {**provenance, "options": dict(options)})
        sections = make(ledger)
        routing = sections.get("routing")
        if self.expert_names:
            sections["expert_names"] = self.expert_names
        tokens = token_texts(routing, self.tokenizer) if routing else {}
        document = add_sections(self.file, self.name, provenance, sections, tokens)
        ledger.close()
        return document

    @property
    def name(self) -> str:
        """How reports call this run."""
        return self.arguments.name or self.arguments.adapter.resolve().name

    def provenance(self) -> dict[str, Any]:
        """What the figures depend on, but for the machine that made them."""
        a, config = self.arguments, self.adapter.config
        return {
            "recipe": config.recipe,
            "options": _options(self.adapter),
            "adapter": {"folder": str(a.adapter), "sha256": self.adapter.sha256},
            "base": {"name": self._model_arguments.model_name_or_path, "class": self.adapter.fingerprint["class"]},
            "data": {name: self._data_of(name) for name in self.documents},
            "settings": {k: getattr(a, k) for k in ("seed", "documents", "max_length", "batch_size", "dtype")},
            "versions": {"python": platform.python_version(), **_versions("molora", "torch", "transformers")},
        }

    def _data_of(self, domain: str) -> dict[str, Any]:
        own = self.documents[domain]
        ids = [row["input_ids"] for rows in own for row in rows]
        source = str(self.arguments.config or self.arguments.domains.get(domain))
        digest = hashlib.sha256(json.dumps(ids).encode()).hexdigest()
        return {"source": source, "documents": len(own), "tokens": sum(map(len, ids)), "sha256": digest}


def _options(adapter: Adapter) -> dict[str, Any]:
    """The method in figures: sizes of the first site of each kind are the same as in the model card."""
    sites = adapter.sites
    return {
        "sites": len(sites),
        "experts": sorted({s.num_experts for s in sites}),
        "top_k": sorted({s.top_k for s in sites if s.top_k is not None}),
        "total_rank": sorted({sum(s.expert_ranks()) for s in sites}),
    }


def _versions(*packages: str) -> dict[str, str]:
    installed = {d.name: d.version for d in distributions()}
    return {p: installed.get(p, "from a checkout") for p in packages}
