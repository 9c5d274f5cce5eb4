"""The section "ablation" of an evaluation: what happens to the loss of each domain when its routing is changed.

Recorded routing says where tokens go; only a change says whether it matters that they go there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from molora import context
from molora.data.examples import Example
from molora.errors import ConfigError, MoloraError
from molora.eval.ablation.edits import Scene
from molora.eval.ablation.lesions import Intervention, check_each, gates, lesions, names_of, silenced
from molora.eval.counting.counter import routed_sites
from molora.eval.counting.metrics import assignment_counts
from molora.eval.counting.stats import SiteInfo
from molora.eval.ledger import Ledger, Track, quiet
from molora.eval.scoring.losses import batch_losses
from molora.eval.scoring.paired import Mixed, Resampled, bounds, mixed, with_labels
from molora.model import MixtureModel
from molora.routing import Routing

__all__ = ["SCHEMA", "Purpose", "ablate", "purposes"]

SCHEMA = 1


class _Measure:
    """A tape that adds up each router's weights over real tokens, and its assignments by domain."""

    def __init__(self, sites: Sequence[SiteInfo], domains: Sequence[str]) -> None:
        self.domains = list(domains)
        self.weights = {s.path: torch.zeros(s.experts, dtype=torch.float64) for s in sites}
        self.tokens = dict.fromkeys(self.weights, 0)
        self.picks = {s.path: torch.zeros(len(domains), s.experts, dtype=torch.float64) for s in sites}
        self.group_B = torch.zeros(0, dtype=torch.int64)

    def add(self, site: str, routing: Routing, valid_BS: Tensor) -> None:
        """One decision; dense weights count with their size, as everywhere."""
        if site not in self.weights:
            return
        valid_T, E = valid_BS.reshape(-1), routing.num_experts
        self.weights[site] += routing.dense()[valid_T].double().sum(0).cpu()
        self.tokens[site] += int(valid_T.sum())
        picks_BE = assignment_counts(routing.weights.abs(), routing.ids, valid_T, E, len(valid_BS))
        self.picks[site].index_add_(0, self.group_B, picks_BE.cpu())

    def found(self) -> dict[str, Any]:
        """Mean weights (E) by site, and assignments (E) by site and domain, as JSON."""
        means = {path: (w / max(self.tokens[path], 1)).tolist() for path, w in self.weights.items()}
        picks = {path: dict(zip(self.domains, p.tolist(), strict=True)) for path, p in self.picks.items()}
        return {"means": means, "picks": picks}


class _Runs:
    """Passes over the same batches."""

    def __init__(self, model: PreTrainedModel, batches: list[Mixed], seed: int) -> None:
        self.model, self.batches, self.seed = model, batches, seed
        self.means: dict[str, Tensor] = {}

    def measured(self, measure: _Measure) -> dict[str, Any]:
        """Losses as trained, and what the routers do meanwhile."""
        with context.taping(self._owner(), measure):
            return {"losses": self.losses(Intervention("as trained", "none"), measure), **measure.found()}

    def losses(self, wanted: Intervention, measure: _Measure | None = None) -> list[list[float]]:
        """``[loss, labels]`` of each document under an intervention."""
        done: dict[int, list[float]] = {}
        for b, batch in enumerate(self.batches):
            if measure is not None:
                measure.group_B = batch.group_B
            with self._under(wanted, b):
                sums_B, labels_B = batch_losses(self.model, batch.inputs)
            if not bool(sums_B.isfinite().all()):
                raise MoloraError(f"ablation: the loss under {wanted.name!r} is not finite; load the base in float32")
            done |= {n: [s, c] for n, s, c in zip(batch.documents, sums_B.tolist(), labels_B.tolist(), strict=True)}
        return [done[n] for n in sorted(done)]

    def _under(self, wanted: Intervention, batch: int) -> contextlib.AbstractContextManager[None]:
        if wanted.off:
            return cast(MixtureModel, self.model).disable_adapter()
        if wanted.silent:
            return silenced(self.model, wanted.silent)
        if not wanted.edits:
            return contextlib.nullcontext()

        def editor(site: str, routing: Routing, valid_BS: Tensor) -> Routing:
            edit = wanted.edits.get(site)
            if edit is None:
                return routing
            return edit(routing, Scene(valid_BS.reshape(-1), self.means[site], f"{self.seed}/{batch}", site))

        return context.editing(self._owner(), editor)

    def _owner(self) -> object:
        return cast(MixtureModel, self.model)._molora.owner


@torch.no_grad()
def ablate(
    model: PreTrainedModel,
    rows: Mapping[str, Sequence[Example]],
    pad_token_id: int,
    *,
    each: str = "auto",
    expert_names: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = 500,
    size: int = 8,
    ledger: Ledger | None = None,
    track: Track = quiet,
) -> dict[str, Any]:
    """Loss by domain as trained and under each intervention, as plain values; the same seed gives the same bytes.

    ``interventions``: the adapter off, each of :data:`molora.eval.ablation.edits.GATES`, and lesions. ``delta`` is the
    loss under it minus the loss as trained, in nats a label, with 95 % bounds over documents resampled within their
    domain, the same ones in both losses. ``worst``: of the domains whose lower bound is above 0 the one with the
    largest delta.

    Args:
        model: converted; put into eval mode.
        rows: documents by domain; those without a label are left out.
        pad_token_id: fills short rows.
        each: the lesions. ``"expert"``: each expert alone, everywhere at once where experts have names, else at each
            router; ``"favourite"``: by domain, at every router the expert with the highest lift for it; ``"none"``;
            ``"auto"``: favourites where there are two domains, and experts if that takes at most 64 passes.
        expert_names: of the experts of every router; by default the names of the adapters that they were made from.
        seed: of shuffles, draws and resamples.
        resamples: of the documents, for the bounds.
        size: about how many rows a batch has; each batch has rows of every domain.
        ledger: keeps ``[loss, labels]`` of each document, so that a run that was cut off goes on.
        track: shows progress.

    Raises:
        ConfigError: for a model that was not converted or chooses nothing, rows that are packed or have no labels, or
            options that fit neither.
        MoloraError: when a loss is not finite.
    """
    sites = _checked(model, resamples, size)
    names = names_of([n for n, _ in cast(MixtureModel, model)._molora.config.adapters], sites, expert_names)
    documents = with_labels(model, rows)
    check_each(each, list(documents))
    model.eval()
    keep = Ledger() if ledger is None else ledger  # an empty one is false
    runs = _Runs(model, mixed(documents, pad_token_id, size), seed)
    plain = keep.piece("ablation: as trained", lambda: runs.measured(_Measure(sites, list(documents))))
    runs.means = {path: torch.tensor(w, dtype=torch.float64) for path, w in plain["means"].items()}
    again = Resampled({name: len(own) for name, own in documents.items()}, resamples, seed)
    before_N2 = torch.tensor(plain["losses"], dtype=torch.float64)
    before, found = again.means(before_N2), []
    for one in track([*gates(sites), *lesions(sites, names, plain["picks"], each)], "ablation"):
        losses = keep.piece(one.key, functools.partial(runs.losses, one))
        after = again.means(torch.tensor(losses, dtype=torch.float64))
        delta = {name: bounds(after[name] - before[name]) for name in documents}
        found.append({"name": one.name, "kind": one.kind, **one.about, "delta": delta, "worst": _worst(delta)})
    labels = before_N2[:, 1].split([len(own) for own in documents.values()])
    return {
        "schema": SCHEMA,
        "seed": seed,
        "documents": {name: len(own) for name, own in documents.items()},
        "tokens": {name: int(own.sum()) for name, own in zip(documents, labels, strict=True)},
        "loss": {name: bounds(values_W) for name, values_W in before.items()},
        "interventions": found,
    }


def _checked(model: PreTrainedModel, resamples: int, size: int) -> tuple[SiteInfo, ...]:
    if not isinstance(model, MixtureModel):
        raise ConfigError(f"ablate: got a plain {type(model).__name__}, expected a model that convert() returned")
    for name, value in (("resamples", resamples), ("size", size)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected at least 1")
    sites = routed_sites(model)
    if not sites:
        raise ConfigError(
            f"ablate: recipe {model._molora.config.recipe!r} has no router with a choice of experts, so there is no "
            "routing to change; compare its loss with that under disable_adapter()"
        )
    return sites


def _worst(delta: Mapping[str, Mapping[str, float]]) -> str | None:
    hurt = {name: d["value"] for name, d in delta.items() if d["low"] > 0}
    return max(hurt, key=hurt.__getitem__) if hurt else None


class Purpose(NamedTuple):
    """What a lesion hurts most: the domain with the delta there, or None for both where it certainly hurts none.

    ``apart``: there are other domains, and it hurts each of them less: their upper bounds are below its lower one.
    """

    name: str
    domain: str | None
    delta: Mapping[str, float] | None
    apart: bool


def purposes(section: Mapping[str, Any]) -> list[Purpose]:
    """What each expert, and each domain's set of favourites, is for; in the order of the section ``ablation``."""
    return [_purpose(i["name"], i["worst"], i["delta"]) for i in section["interventions"] if i["kind"] != "gates"]


def _purpose(name: str, domain: str | None, delta: Mapping[str, Mapping[str, float]]) -> Purpose:
    if domain is None:
        return Purpose(name, None, None, False)
    others = [d["high"] for other, d in delta.items() if other != domain]
    return Purpose(name, domain, delta[domain], bool(others) and max(others) < delta[domain]["low"])
