"""What a routing recorder has counted: plain tensors and names, which add up over shards and ranks."""

from __future__ import annotations

import functools
import re
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from molora import processes
from molora.errors import ConfigError
from molora.eval.counting.tally import length, parts

__all__ = ["RoutingStats", "Sample", "SiteInfo", "merge", "over_processes"]

UNITS = 2048  # most (domain, document) rows of counts; beyond, documents are pooled
BYTES = 32 * 2**20  # most memory of the counts by document, and of those by vocabulary
SCHEMA = 1

Unit = tuple[str, int]  # domain, and the leading bits of a document's hash


@dataclass(frozen=True)
class SiteInfo:
    """A router with a choice: ``choices`` is K; ``dense`` where every expert is used; ``stream`` names its mask."""

    path: str
    layer: int
    experts: int
    choices: int
    dense: bool
    stream: str

    @property
    def kind(self) -> str:
        """The path without its numbers: sites of one kind follow each other through the layers."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "#", self.path)


@dataclass
class Sample:
    """One document kept for looking at. ``tokens``: ids by stream; ``picks``: chunks of (sites (M), ids and weights
    (M, t, K)) in the order seen, the heaviest few slots of each token.
    """

    domain: str
    rank: int
    tokens: dict[str, list[int]]
    picks: list[tuple[list[int], Tensor, Tensor]]


class RoutingStats:
    """Counts of every site of one model over any number of forwards; its size does not grow with the tokens.

    ``sums``: (L) by site, read by :meth:`site`. ``pairs``: which sites follow each other, with ``transitions`` (E, E').
    ``units``: assignments by (domain, document), all sites side by side. ``vocabulary``: (V, E) by site for some sites.
    """

    def __init__(self, sites: tuple[SiteInfo, ...], seed: int = 0, samples: int = 8, vocabulary: int = 0) -> None:
        self.sites, self.seed, self.samples_per_domain, self.vocabulary_size = sites, seed, samples, vocabulary
        self.bits = 64
        width = sum(s.experts for s in sites)
        self.most_units = max(min(UNITS, BYTES // max(8 * width, 1)), 2)
        self.sums = [torch.zeros(length(s.experts), dtype=torch.float64) for s in sites]
        self.pairs = _pairs(sites)
        self.transitions = [torch.zeros(sites[a].experts, sites[b].experts, dtype=torch.float64) for a, b in self.pairs]
        self.units: dict[Unit, Tensor] = {}
        self.vocabulary: dict[int, Tensor] = {}
        self.samples: dict[Unit, Sample] = {}

    def site(self, index: int) -> dict[str, Tensor]:
        """Sums of one site by name, see :func:`molora.eval.counting.tally.parts`."""
        return parts(self.sums[index], self.sites[index].experts)

    def columns(self, index: int) -> slice:
        """Where a site's experts stand in a row of ``units``."""
        start = sum(s.experts for s in self.sites[:index])
        return slice(start, start + self.sites[index].experts)

    def nbytes(self) -> int:
        """Memory of the counts and samples."""
        kept = [t for s in self.samples.values() for _, ids, weights in s.picks for t in (ids, weights)]
        all_ = [*self.sums, *self.transitions, *self.units.values(), *self.vocabulary.values(), *kept]
        return sum(t.untyped_storage().nbytes() for t in all_)

    def domains(self) -> list[str]:
        """Names of the domains seen, sorted."""
        return sorted({domain for domain, _ in self.units})

    def documents(self) -> tuple[Tensor, Tensor]:
        """Assignments by document (N, sum of E) and the index of each one's domain (N), in a fixed order."""
        keys, names = sorted(self.units), self.domains()
        width = sum(s.experts for s in self.sites)
        rows = [self.units[k] for k in keys]
        counts = torch.stack(rows) if rows else torch.zeros(0, width, dtype=torch.float64)
        return counts, torch.tensor([names.index(domain) for domain, _ in keys], dtype=torch.int64)

    def padded(self) -> tuple[Tensor, Tensor]:
        """:meth:`documents` as (N, M, E), the columns beyond a site's experts empty, and the domains (N)."""
        counts, group_N = self.documents()
        largest = max((s.experts for s in self.sites), default=0)
        own = [counts[:, self.columns(i)] for i in range(len(self.sites))]
        padded = [torch.nn.functional.pad(c, (0, largest - c.shape[1])) for c in own]
        return torch.stack(padded, 1) if padded else counts.view(len(counts), 0, 0), group_N

    def add_unit(self, domain: str, document: int, counts: Tensor) -> None:
        """Add a document's assignments. Too many documents are pooled by the leading bits of their hash, all alike,
        so that the order of arrival makes no difference.
        """
        self._put((domain, document >> (64 - self.bits)), counts)
        while len(self.units) > self.most_units and self.bits > 0:
            self.coarsen(self.bits - 1)

    def _put(self, key: Unit, counts: Tensor) -> None:
        before = self.units.get(key)
        self.units[key] = counts.clone() if before is None else before + counts

    def coarsen(self, bits: int) -> None:
        """Pool documents whose hashes agree in the first ``bits`` bits."""
        old, by = self.units, self.bits - bits
        self.units, self.bits = {}, bits
        for (domain, prefix), counts in old.items():
            self._put((domain, prefix >> by), counts)

    def wants(self, domain: str, rank: int) -> bool:
        """Whether a document of this random rank is among the samples, so far."""
        ranks = sorted(s.rank for s in self.samples.values() if s.domain == domain)
        return len(ranks) < self.samples_per_domain or (self.samples_per_domain > 0 and rank <= ranks[-1])

    def trim(self) -> None:
        """Keep the documents of the lowest ranks of each domain."""
        for domain in {s.domain for s in self.samples.values()}:
            own = sorted((s.rank, key) for key, s in self.samples.items() if s.domain == domain)
            for _, key in own[self.samples_per_domain :]:
                del self.samples[key]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors by name and a JSON value that :meth:`from_state` reads; for files, and for other ranks."""
        keys = sorted(self.units)
        tensors = {f"sums.{i}": t.clone() for i, t in enumerate(self.sums)}
        tensors |= {f"transitions.{i}": t.clone() for i, t in enumerate(self.transitions)}
        tensors["units"] = self.documents()[0]
        for i, table in sorted(self.vocabulary.items()):
            ids = table.sum(1).nonzero().flatten()
            tensors |= {f"vocabulary.{i}.ids": ids, f"vocabulary.{i}.counts": table[ids]}
        samples = []
        for n, (key, s) in enumerate(sorted(self.samples.items())):
            for c, (_, ids, weights) in enumerate(s.picks):
                tensors |= {f"sample.{n}.{c}.ids": ids, f"sample.{n}.{c}.weights": weights}
            samples.append({"key": key, "rank": s.rank, "tokens": s.tokens, "sites": [m for m, _, _ in s.picks]})
        meta = {
            "schema": SCHEMA, "seed": self.seed, "samples_per_domain": self.samples_per_domain, "bits": self.bits,
            "vocabulary_size": self.vocabulary_size, "sites": [asdict(s) for s in self.sites], "units": keys,
            "vocabulary": sorted(self.vocabulary), "samples": samples,
        }  # fmt: skip
        return tensors, meta

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], meta: dict[str, Any]) -> RoutingStats:
        """The counts that :meth:`state` gave, also after a trip through JSON and a tensor file.

        Raises:
            ConfigError: when the state was written in another schema.
        """
        if meta.get("schema") != SCHEMA:
            raise ConfigError(
                f"routing counts: got schema {meta.get('schema')!r}, expected {SCHEMA}; record them again"
            )
        sites = tuple(SiteInfo(**s) for s in meta["sites"])
        out = cls(sites, meta["seed"], meta["samples_per_domain"], meta["vocabulary_size"])
        out.bits = meta["bits"]
        out.sums = [tensors[f"sums.{i}"].clone() for i in range(len(sites))]
        out.transitions = [tensors[f"transitions.{i}"].clone() for i in range(len(out.pairs))]
        out.units = {(d, p): row.clone() for (d, p), row in zip(meta["units"], tensors["units"], strict=True)}
        for i in meta["vocabulary"]:
            out.vocabulary[i] = torch.zeros(out.vocabulary_size, sites[i].experts, dtype=torch.int32)
            out.vocabulary[i][tensors[f"vocabulary.{i}.ids"]] = tensors[f"vocabulary.{i}.counts"]
        for n, s in enumerate(meta["samples"]):
            picks = [
                (m, tensors[f"sample.{n}.{c}.ids"], tensors[f"sample.{n}.{c}.weights"])
                for c, m in enumerate(s["sites"])
            ]
            domain, document = s["key"]
            out.samples[domain, document] = Sample(domain, s["rank"], dict(s["tokens"]), picks)
        return out


def _pairs(sites: tuple[SiteInfo, ...]) -> list[tuple[int, int]]:
    """Each site with the next one of its kind and stream."""
    out = []
    for a, site in enumerate(sites):
        later = (b for b in range(a + 1, len(sites)) if (sites[b].kind, sites[b].stream) == (site.kind, site.stream))
        out += [(a, b) for b in [next(later, -1)] if b >= 0]
    return out


def merge(a: RoutingStats, b: RoutingStats) -> RoutingStats:
    """The counts of both, as if one recorder had seen everything; neither is changed.

    Raises:
        ConfigError: when they are of different models, or were made with another seed or sample size.
    """
    for name in ("sites", "seed", "samples_per_domain", "vocabulary_size"):
        if getattr(a, name) != getattr(b, name):
            raise ConfigError(
                f"merge: the two recordings differ in {name}; record both with the same model and options"
            )
    out, other = RoutingStats.from_state(*a.state()), RoutingStats.from_state(*b.state())
    bits = min(out.bits, other.bits)
    for one in (out, other):
        one.coarsen(bits)
    out.sums = [x + y for x, y in zip(out.sums, other.sums, strict=True)]
    out.transitions = [x + y for x, y in zip(out.transitions, other.transitions, strict=True)]
    for i, table in other.vocabulary.items():
        out.vocabulary[i] = out.vocabulary[i] + table if i in out.vocabulary else table
    for (domain, prefix), counts in other.units.items():
        out.add_unit(domain, prefix << (64 - bits), counts)
    for key, sample in other.samples.items():
        mine = out.samples.setdefault(key, Sample(sample.domain, sample.rank, {}, []))
        mine.picks = [*mine.picks, *sample.picks]
        for stream, ids in sample.tokens.items():
            mine.tokens[stream] = [*mine.tokens.get(stream, []), *ids]
    out.trim()
    return out


def over_processes(stats: RoutingStats) -> RoutingStats:
    """The counts of all processes, the same in each; every process has to call it."""
    states: list[Any] = [stats.state()] * processes.count()
    if len(states) > 1:
        distributed.all_gather_object(states, stats.state())
    return functools.reduce(merge, (RoutingStats.from_state(*s) for s in states))
