"""Count routing while a model runs: forwards, generation, encoders and decoders, without changing what it computes."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import ConfigError
from molora.eval.counting.inputs import ENCODER, continues, digest_of, main_input, streams
from molora.eval.counting.stats import BYTES, RoutingStats, Sample, SiteInfo
from molora.eval.counting.tally import Tally, exact, pair_counts, parts, tally
from molora.routers import GATES
from molora.routing import Routing
from molora.surgery.install import sites_of

__all__ = ["RoutingRecorder", "routed_sites"]

SLOTS = 4  # of each sampled token, the heaviest experts that are kept
Seen = tuple[int, Routing, Tensor]


def routed_sites(model: nn.Module) -> tuple[SiteInfo, ...]:
    """The routers of a converted model that choose among at least two experts, in the model's order."""
    out = []
    for _, m in sites_of(model).values():
        if (m.router is not None or m.model_wide) and not m.always_on and m.site.num_experts > 1:
            E, gate = m.site.num_experts, m.placement.gate
            dense = GATES[gate.kind].choice_of(gate) == "dense"
            out.append(SiteInfo(m.site.path, m.site.layer, E, m.site.top_k or E, dense, m.site.mask))
    return tuple(out)


class RoutingRecorder(RoutingStats):
    """A tape that counts. What a forward decided is added up on its device when the forward is over."""

    def __init__(self, model: nn.Module, seed: int, samples: int, sample_tokens: int, vocabulary: bool) -> None:
        config: Any = model.config
        size = getattr(config.get_text_config(), "vocab_size", 0) if vocabulary else 0
        super().__init__(routed_sites(model), seed, samples, size or 0)
        self._sample_tokens = sample_tokens
        self._columns = [torch.arange(c.start, c.stop) for c in map(self.columns, range(len(self.sites)))]
        self._index = {s.path: i for i, s in enumerate(self.sites)}
        self._model = model
        self._seen: dict[int, Seen] = {}
        self._rows: list[tuple[str, int]] = []  # the documents of the current batch
        self._tokens: dict[str, Tensor] = {}
        self._domain: str | Sequence[str] = "all"
        self._named = False
        self._place = self._blocks()
        self._batch: dict[int, Tensor] = {}  # picks since the batch began, by number of experts
        self._with_words = self._sites_with_vocabulary()

    @contextlib.contextmanager
    def batch(self, domain: str | Sequence[str], documents: Sequence[str | int] | None = None) -> Iterator[None]:
        """Forwards within belong to ``domain``: one name, or one a row (where ``generate`` makes beams, one a prompt).

        ``documents``: one key a row; rows of one key are one document wherever they are seen, and all forwards within
        have the same rows. Without them a row's own input is its key, and what is generated from it goes with it.

        Raises:
            ConfigError: when names and rows differ in number; a forward raises it before it starts.
        """
        if documents is not None and not isinstance(domain, str) and len(domain) != len(documents):
            raise ConfigError(f"batch: got {len(domain)} domains for {len(documents)} documents, expected one each")
        self.end_batch()
        self._domain, self._named = domain, documents is not None
        if documents is not None:
            self._rows = [(d, digest_of(k)) for d, k in zip(self._domains(len(documents)), documents, strict=True)]
        try:
            yield
        except BaseException:
            self._seen = {}
            raise
        finally:
            self.end_batch()
            self._domain, self._named = "all", False

    def add(self, site: str, routing: Routing, valid_BS: Tensor) -> None:
        """The tape's side: keep one router's decision until the forward is over."""
        at = self._index.get(site)
        if at is None:
            return
        if at in self._seen:  # a new forward, of a compiled model or a block that runs twice: no hook said so
            self.digest()
        self._seen[at] = (at, routing, valid_BS)

    @torch.no_grad()
    def digest(self) -> None:
        """Add the last forward to the counts."""
        seen, self._seen = self._seen, {}
        if not seen:
            return
        if not self._rows:
            first = next(iter(seen.values()))[2]
            self._rows = [(self._domains(1)[0], digest_of("unknown"))] * first.shape[0]
        alike: dict[tuple[Any, ...], list[Seen]] = defaultdict(list)
        for one in seen.values():
            _, routing, valid_BS = one
            ids = routing.ids
            alike[routing.logits.shape, None if ids is None else ids.shape, id(valid_BS)].append(one)
        tops: dict[int, Tensor] = {}
        unit_NC = torch.zeros(len(self._rows), sum(map(len, self._columns)), dtype=torch.float64)
        for group in alike.values():
            found, valid_BS = tally([r for _, r, _ in group], group[0][2]), group[0][2]
            for m, (i, _, _) in enumerate(group):
                tops[i] = found.top_MT[m]
            self._add_sums(group, found)
            self._add_rows(group, found, unit_NC)
            self._add_words(group, found, valid_BS)
            self._add_samples(group, valid_BS)
        self._add_transitions(tops)
        for (domain, document), counts in zip(self._rows, unit_NC, strict=True):
            if bool(counts.any()):
                self.add_unit(domain, document, counts)

    def _blocks(self) -> dict[int, tuple[int, int]]:
        """Sums of sites with as many experts side by side: one operation adds to all. (E, row) by site."""
        place: dict[int, tuple[int, int]] = {}
        for i, s in enumerate(self.sites):
            place[i] = s.experts, sum(s.experts == E for E, _ in place.values())
        self._block = {E: torch.stack([self.sums[i] for i in place if place[i][0] == E]) for E, _ in place.values()}
        self.show(None)
        return place

    def show(self, device: torch.device | None) -> None:
        """Let ``sums`` be the rows of the blocks, on ``device`` if one is given."""
        self._block = {E: t.to(device) if device else t for E, t in self._block.items()}
        rows = {E: iter(t) for E, t in self._block.items()}
        self.sums = [next(rows[s.experts]) for s in self.sites]

    def _add_sums(self, group: list[Seen], found: Tally) -> None:
        device, E = found.sums.device, found.picks_MBE.shape[-1]
        if self._block[E].device != device:
            self.show(device)
        rows = torch.tensor([self._place[i][1] for i, _, _ in group], device=device)
        self._block[E].index_add_(0, rows, found.sums)
        if E not in self._batch:
            self._batch[E] = torch.zeros(len(self._block[E]), E, dtype=torch.float64, device=device)
        self._batch[E].index_add_(0, rows, found.picks_MBE.sum(1))

    def _add_rows(self, group: list[Seen], found: Tally, unit_NC: Tensor) -> None:
        rows_BC = found.picks_MBE.transpose(0, 1).flatten(1).cpu()
        B, N = len(rows_BC), len(unit_NC)
        columns = torch.cat([self._columns[i] for i, _, _ in group])
        if B % N:
            unit_NC[0].index_add_(0, columns, rows_BC.sum(0))
        else:
            unit_NC.index_add_(1, columns, rows_BC.unflatten(0, (N, B // N)).sum(1))

    def _add_transitions(self, tops: dict[int, Tensor]) -> None:
        alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for n, (a, b) in enumerate(self.pairs):
            if a in tops and b in tops and tops[a].shape == tops[b].shape:
                alike[self.sites[a].experts, self.sites[b].experts, tops[a].shape].append(n)
        for (first_E, second_E, _), numbers in alike.items():
            first_PT, second_PT = (torch.stack([tops[self.pairs[n][side]] for n in numbers]) for side in (0, 1))
            for n, counts in zip(numbers, pair_counts(first_PT, second_PT, first_E, second_E), strict=True):
                self.transitions[n] = self.transitions[n].to(counts.device).add_(counts)

    def _sites_with_vocabulary(self) -> set[int]:
        """As many sites as the memory allows, evenly over the depth."""
        M, cost = len(self.sites), 4 * self.vocabulary_size * max((s.experts for s in self.sites), default=1)
        count = min(M, BYTES // cost) if cost else 0
        return {round(n * (M - 1) / max(count - 1, 1)) for n in range(count)}

    def _ids(self, stream: str, valid_BS: Tensor) -> Tensor | None:
        ids = self._tokens.get(stream)
        return ids if ids is not None and ids.shape == valid_BS.shape else None

    def _add_words(self, group: list[Seen], found: Tally, valid_BS: Tensor) -> None:
        for m, (i, _, _) in enumerate(group):
            ids_BS = self._ids(self.sites[i].stream, valid_BS)
            if i not in self._with_words or ids_BS is None:
                continue
            E, top_T, ids_T = self.sites[i].experts, found.top_MT[m], ids_BS.reshape(-1)
            counted_T = (top_T >= 0) & (ids_T >= 0) & (ids_T < self.vocabulary_size)
            flat = (ids_T * E + top_T)[counted_T]
            if i not in self.vocabulary:
                self.vocabulary[i] = torch.zeros(self.vocabulary_size, E, dtype=torch.int32, device=flat.device)
            self.vocabulary[i].view(-1).index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))

    def _add_samples(self, group: list[Seen], valid_BS: Tensor) -> None:
        B, N = valid_BS.shape[0], len(self._rows)
        first = {row: n for n, row in reversed(list(enumerate(self._rows)))}  # beams and copies: one is enough
        wanted = [] if B % N else [n for row, n in first.items() if self.wants(row[0], self._rank(row))]
        sites, stream = [i for i, _, _ in group], self.sites[group[0][0]].stream
        room = {n: self._sample_tokens - self._held(self._rows[n], sites[0]) for n in wanted}
        if not any(count > 0 for count in room.values()):
            return
        weights_MTK = torch.stack([r.weights.float() for _, r, _ in group])
        weights_MTK, slot_MTK = weights_MTK.topk(min(SLOTS, weights_MTK.shape[-1]), -1)
        ids_MTK = torch.stack([r.slot_ids() for _, r, _ in group]).gather(2, slot_MTK)
        tokens_BS = self._ids(stream, valid_BS)
        leads = sites[0] == next(i for i, s in enumerate(self.sites) if s.stream == stream)
        for n in wanted:
            b, key = n * (B // N), self._rows[n]
            at = valid_BS[b].nonzero().flatten()[: max(room[n], 0)] + b * valid_BS.shape[1]
            if not len(at):
                continue
            sample = self.samples.setdefault(key, Sample(key[0], self._rank(key), {}, []))
            sample.picks.append((sites, ids_MTK[:, at].to("cpu", torch.int16), weights_MTK[:, at].half().cpu()))
            if leads and tokens_BS is not None:
                sample.tokens[stream] = [*sample.tokens.get(stream, []), *tokens_BS.reshape(-1)[at].tolist()]
        self.trim()

    def _held(self, key: tuple[str, int], site: int) -> int:
        """Tokens of a document that its sample has at a site."""
        sample = self.samples.get(key)
        return sum(ids.shape[1] for own, ids, _ in sample.picks if site in own) if sample else 0

    def _rank(self, row: tuple[str, int]) -> int:
        return digest_of(f"{self.seed}/{row[0]}/{row[1]}")

    def _domains(self, rows: int) -> list[str]:
        names = [self._domain] if isinstance(self._domain, str) else list(self._domain)
        if not names or rows % len(names):
            raise ConfigError(f"batch: got {len(names)} domains for {rows} rows, expected one name, or one a row")
        return [name for name in names for _ in range(rows // len(names))]

    def end_batch(self) -> None:
        """The batch's own load violation, and forget its documents."""
        self.digest()
        for E, picks_ME in self._batch.items():
            named, total_M = parts(self._block[E], E), picks_ME.sum(1)
            excess_M = exact(picks_ME.amax(1) / total_M.clamp_min(1e-12) * E - 1)
            named["batch_violation"].add_(excess_M * (total_M > 0))
            named["batches"].add_(total_M > 0)
        self._batch, self._rows, self._tokens = {}, [], {}

    def before(self, arguments: dict[str, Any]) -> None:
        """A forward begins: whose rows are these, and which tokens?"""
        self._seen = {}  # of a forward that failed
        main = main_input(self._model, arguments)
        if main is None:
            return
        goes_on = self._rows and (self._named or continues(arguments))
        if not goes_on or (main.shape[0] % len(self._rows) and not self._named):
            self.end_batch()
            mask = arguments.get(ENCODER)
            fits = isinstance(mask, Tensor) and mask.shape == main.shape
            rows = [r[mask[b] != 0] if fits else r for b, r in enumerate(main)]  # type: ignore[index]
            self._rows = [(d, digest_of(r)) for d, r in zip(self._domains(len(rows)), rows, strict=True)]
        elif main.shape[0] % len(self._rows):
            raise ConfigError(f"batch: got {len(self._rows)} documents for {main.shape[0]} rows, expected one a row")
        self._tokens = streams(self._model, arguments)
