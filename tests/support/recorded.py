"""What the tests of the routing recorder share: batches with padding, recordings, and counting token by token."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from molora.eval.counting.counter import RoutingRecorder
from molora.eval.counting.stats import RoutingStats
from molora.eval.counting.tape import RoutingTape
from molora.eval.counting.watch import collect_routing
from tests.support import tiny
from tests.support.tolerances import close


def padded(name: str, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch whose second row ends in padding."""
    inputs = tiny.batch(name, rows=rows, seed=seed)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][1, -3:] = 0
    return inputs


def slow_counts(tape: RoutingTape, site: str, experts: int) -> dict[str, Any]:
    """Picks, co-activation, tokens and repeats of one site, token by token."""
    picks, together = torch.zeros(experts).double(), torch.zeros(experts, experts).double()
    tokens = repeats = 0
    for r in tape[site]:
        before = None
        for t in range(len(r.weights)):
            if t % (len(r.weights) // r.rows) == 0:
                before = None
            if not r.valid[t]:
                before = None
                continue
            tokens += 1
            if r.ids is None:
                picks += r.weights[t].abs().double()
                top = int(r.weights[t].abs().argmax())
            else:
                chosen = [int(e) for e in r.ids[t] if e >= 0]
                for a in chosen:
                    picks[a] += 1
                    for b in chosen:
                        together[a, b] += 1
                top = max(chosen, key=lambda e: (float(r.probs[t, e]), -e)) if chosen else -1
            repeats += before is not None and top >= 0 and before == top
            before = top if top >= 0 else None
    return {"picks": picks, "together": together, "tokens": tokens, "repeats": repeats}


def agree(stats: RoutingStats, tape: RoutingTape) -> None:
    recorded = [s for s, records in tape.items() if records[0].num_experts > 1]
    assert sorted(recorded) == sorted(s.path for s in stats.sites)
    for i, site in enumerate(stats.sites):
        slow, fast = slow_counts(tape, site.path, site.experts), stats.site(i)
        close(fast["picks"], slow["picks"], "counted")
        assert torch.equal(fast["together"], slow["together"])
        assert (int(fast["tokens"]), int(fast["repeats"])) == (slow["tokens"], slow["repeats"])
        by_document, _ = stats.documents()
        torch.testing.assert_close(by_document[:, stats.columns(i)].sum(0), fast["picks"])


def stats_of(model: Any, batches: list[tuple[str, int]], **options: Any) -> RoutingRecorder:
    with collect_routing(model, **options) as stats:
        for domain, seed in batches:
            with stats.batch(domain):
                tiny.output(model, padded("llama", seed=seed))
    return stats


def same(a: RoutingStats, b: RoutingStats) -> None:
    (tensors_a, meta_a), (tensors_b, meta_b) = a.state(), b.state()
    assert json.dumps(meta_a) == json.dumps(meta_b)
    assert save(tensors_a) == save(tensors_b)


BATCHES = [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("c", 4), ("a", 5)]
