"""The numbers of an evaluation document as the page carries them: small ones as JSON, large tables as packed bytes."""

from __future__ import annotations

import array
import base64
import json
import math
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["Packer", "compressed", "embedded_json", "pack"]

PAGE_MATRICES = 2_700_000  # most numbers of expert-by-expert tables in a page; with the bytes below it stays under 8 MB
PAGE_SAMPLES = 1_300_000  # most compressed bytes of sampled documents in a page
PAGE_VOCABULARY = 64  # most vocabulary tables in a page
FINE = 65535
PERCENT = 100  # levels of shares, cosines and sampled weights: nothing on the page is read more finely than 1 %


class Packer:
    """Tables of numbers as unsigned integers of 8 or 16 bits, one after the other; each leaves a reference behind.

    A reference is ``{"at": byte, "bits": 8 | 16, "low", "step", "rows", "columns"}``: the value of a code is
    ``low + step * code``; ``columns`` is a number, or a list where rows differ in length.
    """

    def __init__(self) -> None:
        self._data = bytearray()

    def add(self, rows: Sequence[Sequence[float]], low: float, step: float) -> dict[str, Any]:
        """The reference to ``rows``, after rounding to multiples of ``step`` above ``low``."""
        flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
        codes = ((flat - low) / step).round().clamp(0, FINE).long().tolist()
        bits = 8 if max(codes, default=0) < 256 else 16
        at, widths = len(self._data), [len(row) for row in rows]
        self._data += encoded(codes, bits)
        columns = widths[0] if widths and len(set(widths)) == 1 else widths
        return {"at": at, "bits": bits, "low": low, "step": step, "rows": len(rows), "columns": columns}

    def fine(self, rows: Sequence[Sequence[float]]) -> dict[str, Any]:
        """Numbers from 0 on, to a 65,535th of the largest."""
        return self.add(rows, 0.0, (max((x for row in rows for x in row), default=0) or 1) / FINE)

    def shares(self, rows: Sequence[Sequence[float]], low: float = 0.0) -> dict[str, Any]:
        """Numbers from ``low`` to 1, to a hundredth."""
        return self.add(rows, low, 1 / PERCENT)

    def bulk(self) -> str:
        """All bytes, compressed, as base64."""
        return compressed(bytes(self._data))


def encoded(codes: Sequence[int], bits: int) -> bytes:
    """Little-endian unsigned integers."""
    if bits == 8:
        return bytes(codes)
    words = array.array("H", codes)
    if sys.byteorder == "big":
        words.byteswap()
    return words.tobytes()


def compressed(data: bytes) -> str:
    """What the browser's ``DecompressionStream("deflate")`` reads, as base64."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def embedded_json(value: Any) -> str:
    """JSON that may stand in a script element: no character of it can end the element; not-a-number becomes null."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def pack(document: Mapping[str, Any], pages: int = 1) -> tuple[dict[str, Any], str]:
    """The document with its large tables packed, and the packed bytes as text.

    ``pages``: documents that share one page and with it the limits. What did not fit is told in ``shown``: by part, how
    much there is and how much of it the page has, evenly over the depth, or the first samples of each domain.
    """
    packer, out, shown = Packer(), dict(document), dict[str, Any]()
    if document.get("routing"):
        out["routing"] = _routing(document["routing"], packer, shown, pages)
    if document.get("experts"):
        kept, shown["experts"] = _spread(list(document["experts"].items()), _fitting(document, pages))
        out["experts"] = {path: {**e, "cosine": packer.shares(e["cosine"], -1.0)} for path, e in kept}
    return {**out, "shown": shown}, packer.bulk()


def _fitting(document: Mapping[str, Any], pages: int) -> int:
    """How many expert-by-expert tables of each of the three parts a page can hold."""
    sites = (document.get("routing") or {}).get("sites", [])
    largest = max([s["experts"] for s in sites] + [len(e["norm"]) for e in (document.get("experts") or {}).values()])
    return max(int(PAGE_MATRICES / 3 / pages / largest**2), 1)


def _spread(items: list[Any], most: int) -> tuple[list[Any], dict[str, int]]:
    """At most ``most`` of the items, evenly spread, and the counts for ``shown``."""
    count = min(len(items), most)
    kept = [items[round(n * (len(items) - 1) / max(count - 1, 1))] for n in range(count)]
    return kept, {"of": len(items), "shown": count}


def _routing(routing: Mapping[str, Any], packer: Packer, shown: dict[str, Any], pages: int) -> dict[str, Any]:
    out = dict(routing)
    most = _fitting({"routing": routing}, pages)
    for key in ("load_of_all", "importance"):
        out[key] = packer.fine(routing[key])
    out["load"] = {name: packer.fine(rows) for name, rows in routing["load"].items()}
    if routing.get("lift"):
        out["lift"] = {
            name: {key: packer.fine(rows) for key, rows in bounds.items()} for name, bounds in routing["lift"].items()
        }
    if routing.get("divergence"):
        out["divergence"] = [packer.shares(rows) for rows in routing["divergence"]]
    there = [i for i, matrix in enumerate(routing["coactivation"]) if matrix]
    kept, shown["coactivation"] = _spread(there, most)
    wanted = set(kept)
    out["coactivation"] = [packer.shares(m) if i in wanted else None for i, m in enumerate(routing["coactivation"])]
    pairs, shown["transitions"] = _spread(routing["transitions"], most)
    out["transitions"] = [{**pair, "share": packer.shares(pair["share"])} for pair in pairs]
    out["vocabulary"], shown["vocabulary"] = _spread(routing["vocabulary"], max(PAGE_VOCABULARY // pages, 1))
    out["samples"], shown["samples"] = _samples(routing["samples"], packer, pages)
    return out


def _samples(
    samples: Sequence[Mapping[str, Any]], packer: Packer, pages: int
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """As many of each domain as fit, but at least one; ``experts`` and ``weights`` have a row a site, (t, K) flat."""
    place: list[int] = []
    seen: dict[str, int] = {}
    for s in samples:
        place.append(seen.get(s["domain"], 0))
        seen[s["domain"]] = place[-1] + 1
    low = min(0.0, *(_lowest(s) for s in samples), 0.0)
    step = (max(1.0, *(_lowest(s, -1) for s in samples), 1.0) - low) / PERCENT
    sizes = [_size(s, low, step) for s in samples]
    most = max(seen.values(), default=0)
    while most > 1 and sum(z for z, n in zip(sizes, place, strict=True) if n < most) * pages > PAGE_SAMPLES:
        most -= 1
    out = []
    for sample, n in zip(samples, place, strict=True):
        if n >= most:
            continue
        picked = [_flat(site) for site in sample["sites"]]
        out.append(
            {
                "domain": sample["domain"],
                "tokens": sample["tokens"],
                "sites": [[site["site"], len(site["experts"][0])] for site in sample["sites"] if site["experts"]],
                "experts": packer.add([ids for ids, _ in picked if ids], -1.0, 1.0),
                "weights": packer.add([weights for ids, weights in picked if ids], low, step),
            }
        )
    return out, {"of": max(seen.values(), default=0), "shown": most}


def _flat(site: Mapping[str, Any]) -> tuple[list[int], list[float]]:
    return [e for ids in site["experts"] for e in ids], [w for weights in site["weights"] for w in weights]


def _lowest(sample: Mapping[str, Any], sign: int = 1) -> float:
    """The least of the weights, or with ``sign`` -1 the largest."""
    return sign * min((sign * w for site in sample["sites"] for ws in site["weights"] for w in ws), default=0.0)


def _size(sample: Mapping[str, Any], low: float, step: float) -> int:
    """Bytes that a sample takes when compressed."""
    alone = Packer()
    for ids, weights in map(_flat, sample["sites"]):
        alone.add([ids], -1.0, 1.0)
        alone.add([weights], low, step)
    return len(zlib.compress(bytes(alone._data), 6))
