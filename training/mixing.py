"""Mix domains in given shares."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from molora.data.examples import Example

__all__ = ["mix"]


def mix(domains: Mapping[str, Sequence[Example]], weights: Mapping[str, float], total: int, seed: int) -> list[Example]:
    """Draw ``total`` rows (0: as many as there are) from the domains in proportion to their weights (1 when not given).

    Every row of a domain is used before any is used again; the result is shuffled. Depends on its arguments only.
    """
    total = total or sum(map(len, domains.values()))
    share = {name: weights.get(name, 1.0) for name in domains}
    exact = {name: total * w / sum(share.values()) for name, w in share.items()}
    count = {name: int(x) for name, x in exact.items()}
    for name in sorted(exact, key=lambda n: count[n] - exact[n])[: total - sum(count.values())]:
        count[name] += 1
    rows: list[Example] = []
    for name, examples in domains.items():
        rng = random.Random(f"{seed}/{name}")
        for start in range(0, count[name], max(1, len(examples))):
            rows += rng.sample(list(examples), min(len(examples), count[name] - start))
    random.Random(seed).shuffle(rows)
    return rows
