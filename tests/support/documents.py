"""Evaluation documents for the tests of the report: routing of tiny models, the other sections by hand."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from molora.eval.counting.experts import expert_report
from molora.eval.counting.summary import summary
from molora.eval.counting.watch import collect_routing
from tests.support import tiny
from tests.support.traits import traits

# Names and tokens as they come from users' folders and from byte-level tokenizers.
HOSTILE = "<script>alert('1')</script> & \"quotes\" {{ 7 * 7 }}"
DOMAINS = ("code", HOSTILE, "ישראל 🙂")
TOKENS = ("the", " of", "\n", " ", "    ", "\t", "\ufffd", "</script>", "<b>bold</b>", '"', "'", "&amp;", "שלום", "🙂",
          "\u202e", "", " def", "():", " return", " x", "1", "2", "=", " +", ".", ",", " long" * 6,
          "%{x}", "$a$", "\\")  # fmt: skip


def token_texts() -> dict[str, str]:
    """A text for each of the tiny models' 64 token ids but the last, which the page has to show without one."""
    return {str(i): TOKENS[i % len(TOKENS)] for i in range(63)}


def found(value: float, width: float = 0.05) -> dict[str, float]:
    return {"value": round(value, 6), "low": round(value - width, 6), "high": round(value + width, 6)}


def ablation(seed: int, domains: tuple[str, ...] = DOMAINS) -> dict[str, Any]:
    """Gates that hurt, one expert that each domain needs, and one that nobody does."""
    r = random.Random(seed)

    def row(name: str, kind: str, size: list[float], **more: Any) -> dict[str, Any]:
        delta = {d: found(x) for d, x in zip(domains, size, strict=True)}
        hurt = [d for d in domains if delta[d]["low"] > 0]
        worst = max(hurt, key=lambda d: delta[d]["value"]) if hurt else None
        return {"name": name, "kind": kind, "delta": delta, "worst": worst, **more}

    def noise() -> list[float]:
        return [r.gauss(0, 0.02) for _ in domains]

    gates = [row(n, "gates", [abs(r.gauss(0.2, 0.1)) for _ in domains])
             for n in ("off", "uniform", "shuffled", "random", "top-1", "frozen")]  # fmt: skip
    experts = []
    for e in range(4):
        size = noise()
        if e < len(domains):
            size[e] += 0.3
        experts.append(row(f"layer 1 expert {e}", "expert", size, site=0, expert=e))
    favourites = [row(f"favourites of {d}", "favourites", [0.4 * (a == d) for a in domains], domain=d) for d in domains]
    return {
        "schema": 1,
        "seed": 0,
        "documents": dict.fromkeys(domains, 9),
        "tokens": dict.fromkeys(domains, 900),
        "loss": {d: found(2.0) for d in domains},
        "interventions": [*gates, *experts, *favourites],
    }


def scores(seed: int, domains: tuple[str, ...] = DOMAINS) -> dict[str, Any]:
    r = random.Random(seed)
    losses = {d: r.uniform(1.5, 3) for d in domains}
    return {
        "schema": 1,
        "perplexity": {
            d: {"loss": found(x), "perplexity": round(2.718281828**x, 6), "tokens": 1234, "documents": 9}
            for d, x in losses.items()
        },
        "multiple_choice": {
            "arc": {
                "accuracy": found(r.uniform(0.3, 0.6)),
                "accuracy_normalised": found(r.uniform(0.3, 0.6)),
                "questions": 200,
                "chance": 0.25,
            }
        },
        "exact_match": {"sums": {**found(r.uniform(0.2, 0.8)), "questions": 50}},
    }


def training(steps: int = 12) -> list[dict[str, float]]:
    log: list[dict[str, float]] = [
        {
            "step": 10 * n,
            "epoch": n / 10,
            "loss": 3 / n + 1,
            "aux_loss": 1 + 0.5 / n,
            "learning_rate": 1e-3 * (1 - n / 20),
        }
        for n in range(1, steps + 1)
    ]
    return [*log, {"step": 10 * steps, "train_runtime": 12.5, "loss": float("nan")}]


def document(
    recipe: str, root: Path, name: str = "", base: str = "llama", seed: int = 0, samples: int = 4
) -> dict[str, Any]:
    """A whole document: the routing and the experts are those of an armed tiny model on random texts."""
    model = tiny.converted(recipe, base, root)
    tiny.arm(model, seed=seed + 1)
    with collect_routing(model, samples=samples, seed=seed) as stats:
        for n in range(6):
            with stats.batch(DOMAINS[n % 3]):
                tiny.output(model, tiny.batch(base, rows=3, length=24, seed=10 * (n % 3) + n // 3))
    return {
        "schema": 1,
        "name": name or recipe,
        "provenance": {
            "recipe": recipe,
            "options": tiny.SMALL[recipe],
            "adapter": {"folder": f"runs/{HOSTILE}", "sha256": "0" * 64},
            "base": {"name": base, "class": type(model).__name__},
            "data": {d: {"source": f"{d}.jsonl", "documents": 6, "tokens": 144, "sha256": str(i) * 64}
                     for i, d in enumerate(DOMAINS)},
            "settings": {"seed": seed, "max_length": 128},
            "versions": {"molora": "0.1.0", "python": "3.11.7"},
        },
        "expert_names": list(tiny.adapters(root, base)) if traits(recipe).imported else None,
        "tokens": token_texts(),
        "routing": summary(stats, seed, 50, 50),
        "experts": expert_report(model, first=4),
        "scores": scores(seed),
        "ablation": ablation(seed),
        "training": training(),
    }  # fmt: skip


def largest() -> dict[str, Any]:
    """Routing as large as it gets, of random numbers, which are the hardest to compress: 210 routers of 64 experts,
    4 domains, 8 samples of 128 tokens with 4 slots each.
    """
    r = random.Random(0)
    M, E, G, T, K = 210, 64, 4, 128, 4
    domains = [f"domain {g}" for g in range(G)]

    def table(rows: int, columns: int, most: float = 1.0) -> list[list[float]]:
        return [[round(r.random() * most, 6) for _ in range(columns)] for _ in range(rows)]

    def by_site() -> list[float]:
        return [round(r.random(), 6) for _ in range(M)]

    paths = [f"model.layers.{m // 7}.part.{'abcdefg'[m % 7]}_proj" for m in range(M)]
    sites = [
        {"path": p, "layer": m // 7, "kind": p.replace(f".{m // 7}.", ".#."), "experts": E, "choices": 8,
         "stream": "attention_mask"}
        for m, p in enumerate(paths)
    ]  # fmt: skip
    keys = ("cv", "max_violation", "max_violation_of_a_batch", "least_load", "effective_experts", "entropy_of_load",
            "entropy_of_mean", "mean_entropy", "repeat_rate", "near_ties")  # fmt: skip
    samples = [
        {"domain": d, "tokens": {"attention_mask": [r.randrange(49152) for _ in range(T)]}, "sites": [
            {"site": m, "experts": [r.sample(range(E), K) for _ in range(T)], "weights": table(T, K)} for m in range(M)
        ]}
        for d in domains for _ in range(8)
    ]  # fmt: skip
    routing = {
        "schema": 1, "seed": 0, "sites": sites, "domains": {d: {"documents": 500} for d in domains},
        "documents_pooled": False, "load": {d: table(M, E) for d in domains}, "tokens": [10**6] * M,
        "load_of_all": table(M, E), "importance": table(M, E), "dead": [[]] * M, **{key: by_site() for key in keys},
        "coactivation": [table(E, E) for _ in range(M)],
        "specialisation": {"nmi": 0.1, "nmi_per_site": by_site(), "chance": 0.01, "p_value": 0.001,
                           "permutations": 1000, "above_chance": 0.09, "interval": [0.08, 0.1], "resamples": 500},
        "divergence": [table(G, G) for _ in range(M)],
        "lift": {d: {key: table(M, E, 4) for key in ("value", "low", "high")} for d in domains},
        "transitions": [{"from": m, "to": m + 7, "share": table(E, E)} for m in range(M - 7)],
        "vocabulary": [{"site": m, "share": 0.4, "ids": 500, "words": [
            [(r.randrange(49152), 0.5, 30) for _ in range(10)] for _ in range(E)]} for m in (0, M - 1)],
        "samples": samples,
    }  # fmt: skip
    experts = {p: {"cosine": table(E, E), "norm": table(1, E)[0], "intruders": [3] * E} for p in paths}
    return {"schema": 1, "name": "largest", "routing": routing, "experts": experts}
