"""Adapter folders that are damaged, forged or hostile, as tables: name to the change that makes them so.

Forged: the digest and the checksum are made to fit, so that another check has to refuse it. Damaged: they are not.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load as library_load
from safetensors.torch import save as library_save

from tests.support.folders import joined, parts

Edit = Callable[[dict[str, Any]], object]


def header(change: Callable[[dict[str, Any], str, str], object]) -> Callable[[bytes], bytes]:
    """``change(header, first tensor's name, second's)`` in place, the data as they are."""

    def edit(weights: bytes) -> bytes:
        entries, data = parts(weights)
        names = sorted((n for n in entries if n != "__metadata__"), key=lambda n: entries[n]["data_offsets"])
        change(entries, names[0], names[1])
        return joined(entries, data)

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor], str], object]) -> Callable[[bytes], bytes]:
    """``change(tensors, the first one's name)`` in place, written by the library."""

    def edit(weights: bytes) -> bytes:
        named = library_load(weights)
        change(named, min(named))
        return library_save(named, metadata={"format": "pt"})

    return edit


def twice(weights: bytes) -> bytes:
    entries, data = parts(weights)
    name = next(n for n in entries if n != "__metadata__")
    text = json.dumps(entries)
    return joined((text[:-1] + f", {json.dumps(name)}: {json.dumps(entries[name])}}}").encode(), data)


def hole(weights: bytes) -> bytes:
    entries, data = parts(weights)
    for name, entry in entries.items():
        if name != "__metadata__" and entry["data_offsets"][0]:
            entry["data_offsets"] = [o + 8 for o in entry["data_offsets"]]
    return joined(entries, data + b"\0" * 8)


def zip_of_torch(weights: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save(library_load(weights), buffer)
    return buffer.getvalue()


class Bomb:
    """Pickled: a command that leaves a file behind."""

    def __init__(self, canary: str) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def tiny_tensors(weights: bytes) -> bytes:
    names = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(100_000)}
    return joined(names, b"\0" * 100_000)


FORGED_WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda w: b"",
    "seven bytes": lambda w: w[:7],
    "cut header": lambda w: w[:60],
    "cut body": lambda w: w[:-1],
    "trailing bytes": lambda w: w + b"\0",
    "header of 2^63 bytes": lambda w: (1 << 63).to_bytes(8, "little") + w[8:],
    "header beyond the file": lambda w: len(w).to_bytes(8, "little") + w[8:],
    "header is not UTF-8": lambda w: joined(b'{"\xff\xfe": 1}', b""),
    "header is not JSON": lambda w: joined(b'{"a": ', parts(w)[1]),
    "header is an array": lambda w: joined([], b""),
    "header starts with a space": lambda w: joined(b" " + json.dumps(parts(w)[0]).encode(), parts(w)[1]),
    "header nests deep": lambda w: joined(b'{"a":' * 900 + b"1" + b"}" * 900, b""),
    "overlap": header(lambda h, a, b: h[b].update(data_offsets=h[a]["data_offsets"])),
    "hole": hole,
    "size does not fit the shape": header(lambda h, a, b: h[a].update(shape=[1, 1])),
    "offsets go down": header(lambda h, a, b: h[a].update(data_offsets=h[a]["data_offsets"][::-1])),
    "offsets are negative": header(lambda h, a, b: h[a].update(data_offsets=[-8, 8])),
    "offsets are fractions": header(lambda h, a, b: h[a].update(data_offsets=[0.0, 64.0])),
    "shape overflows": header(lambda h, a, b: h[a].update(shape=[1 << 62, 1 << 62])),
    "shape is negative": header(lambda h, a, b: h[a].update(shape=[-1, -64])),
    "shape is true": header(lambda h, a, b: h[a].update(shape=[True, 64])),
    "shape is text": header(lambda h, a, b: h[a].update(shape="64")),
    "unknown dtype": header(lambda h, a, b: h[a].update(dtype="F128")),
    "dtype is a list": header(lambda h, a, b: h[a].update(dtype=["F32"])),
    "entry is a number": header(lambda h, a, b: h.update({a: 1})),
    "entry has more to say": header(lambda h, a, b: h[a].update(file="/etc/passwd")),
    "metadata are numbers": header(lambda h, a, b: h.update(__metadata__={"format": 1})),
    "metadata are text": header(lambda h, a, b: h.update(__metadata__="pt")),
    "repeated key": twice,
    "a hundred thousand tensors": tiny_tensors,
    "pickle": lambda w: pickle.dumps({"a": 1}),
    "torch.save": zip_of_torch,
    "NaN": tensors(lambda t, a: t[a].view(-1)[:1].fill_(float("nan"))),
    "infinity": tensors(lambda t, a: t[a].view(-1)[:1].fill_(float("-inf"))),
    "missing tensor": tensors(lambda t, a: t.pop(a)),
    "extra tensor": tensors(lambda t, a: t.update({f"{a}x": torch.ones(1)})),
    "other shape": tensors(lambda t, a: t.update({a: t[a].t().reshape(-1, 1)})),
    "other kind of numbers": tensors(lambda t, a: t.update({a: t[a].long()})),
    "name without the prefix": tensors(lambda t, a: t.update({a.removeprefix("base_model."): t.pop(a)})),
    "name with a line break": tensors(lambda t, a: t.update({f"{a}\n": t.pop(a)})),
    "base weights among them": tensors(
        lambda t, a: t.update({f"{a.partition('.bank')[0]}.base_layer.weight": t[a].clone()})
    ),
}


def swapped(weights: bytes) -> bytes:
    named = library_load(weights)
    pairs = {t.shape: n for n, t in sorted(named.items())}
    a = next(n for n, t in sorted(named.items()) if pairs[t.shape] != n)
    b = pairs[named[a].shape]
    named[a], named[b] = named[b], named[a]
    return library_save(named, metadata={"format": "pt"})


DAMAGED_WEIGHTS: dict[str, Callable[[bytes], bytes]] = {
    "one flipped bit": lambda w: w[:-3] + bytes([w[-3] ^ 1]) + w[-2:],
    "two tensors of one shape swapped": swapped,
    "other header, same tensors": lambda w: joined(*parts(w)),
}


def site(**values: Any) -> Edit:
    return lambda c: c["sites"][0].update(values)


def config(**values: Any) -> Edit:
    return lambda c: c["config"].update(values)


def placement(part: str | None = None, **values: Any) -> Edit:
    return lambda c: (c["config"]["placements"][0] if part is None else c["config"]["placements"][0][part]).update(
        values
    )


FORGED_CONFIGS: dict[str, Edit] = {
    "bool for int": site(num_experts=True),
    "float for int": site(in_features=32.0),
    "text for int": site(in_features="32"),
    "null for text": site(path=None),
    "bool for float": site(scales=[True]),
    "negative rank": site(ranks=[-1]),
    "rank 10^9": site(ranks=[10**9]),
    "a billion experts": site(num_experts=10**9),
    "a billion experts of rank 0": site(num_experts=10**9, ranks=[0]),
    "10^17 inputs": site(in_features=10**17),
    "ranks for other experts": site(ranks=[1, 2, 3]),
    "scales for other experts": site(scales=[1.0, 2.0, 3.0]),
    "ranks without scales": site(scales=[]),
    "more choices than experts": site(top_k=10**6),
    "unknown role": site(role="exec"),
    "placement out of range": site(placement=7),
    "placement from the end": site(placement=-1),
    "path with a line break": site(path="model.layers.0\n.mlp"),
    "path upward": site(path="../../etc/passwd"),
    "path to nowhere": site(path="model.layers.0.mlp.nothing"),
    "path to another module": site(path="model.embed_tokens"),
    "path to no linear": site(path="model.layers.0"),
    "absolute path": site(path="/etc/passwd"),
    "empty path": site(path=""),
    "a site twice": lambda c: c["sites"].append(c["sites"][0]),
    "no sites": lambda c: c["sites"].clear(),
    "sites are an object": lambda c: c.update(sites={}),
    "a site is a number": lambda c: c["sites"].append(1),
    "unknown entry of a site": site(file="/etc/passwd"),
    "unknown entry": lambda c: c.update(auto_map={"AutoModel": "evil.Model"}),
    "unknown entry of the config": config(entry_point="os.system"),
    "hundreds of unknown entries": lambda c: c.update({f"k{i}": 0 for i in range(500)}),
    "a key of a million letters": lambda c: c.update({"k" * 10**6: 0}),
    "no config": lambda c: c.pop("config"),
    "config is null": lambda c: c.update(config=None),
    "no placements": config(placements=[]),
    "newer format": lambda c: c.update(molora_format=2),
    "format is text": lambda c: c.update(molora_format="1"),
    "format 0": lambda c: c.update(molora_format=0),
    "other software": lambda c: c.update(peft_type="LOHA"),
    "no software": lambda c: c.pop("peft_type"),
    "digest is missing": lambda c: c.pop("sha256"),
    "digest is a list": lambda c: c.update(sha256=["0" * 64]),
    "digest of something else": lambda c: c.update(sha256="0" * 64),
    "fingerprint is empty": lambda c: c.update(fingerprint={}),
    "another base": lambda c: c["fingerprint"].update(hidden_size=33),
    "unknown router": placement("router", kind="os.system"),
    "router of great depth": placement("router", depth=10**9),
    "router of another scope": placement("router", scope="model"),
    "unknown activation": placement("gate", activation="eval"),
    "unknown balance rule": lambda c: c["config"]["placements"][0]["balance"].append({"kind": "eval"}),
    "unknown kernel": config(kernel="../../evil.so"),
    "modules to save that are not there": config(modules_to_save=["lm_head"]),
    "no rank": placement(r=[]),
    "negative alpha": placement(lora_alpha=-1.0),
    "dropout of 1": placement(lora_dropout=1.0),
}
RAW_CONFIGS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda j: b"",
    "not UTF-8": lambda j: j.replace(b"MOLORA", b"\xff\xfe"),
    "UTF-16": lambda j: j.decode().encode("utf-16"),
    "byte order mark": lambda j: b"\xef\xbb\xbf" + j,
    "an array": lambda j: b"[" + j + b"]",
    "text": lambda j: b'"MOLORA"',
    "cut": lambda j: j[: len(j) // 2],
    "trailing text": lambda j: j + b"{}",
    "NaN": lambda j: j.replace(b'"lora_alpha": 16', b'"lora_alpha": NaN'),
    "minus infinity": lambda j: j.replace(b'"lora_alpha": 16', b'"lora_alpha": -Infinity'),
    "1e999": lambda j: j.replace(b'"lora_alpha": 16', b'"lora_alpha": 1e999'),
    "repeated key": lambda j: j.replace(b'"lora_alpha": 16', b'"lora_alpha": 16, "lora_alpha": 16'),
    "integer of 5,000 digits": lambda j: j.replace(b'"lora_alpha": 16', b'"lora_alpha": ' + b"1" * 5000),
    "half a surrogate pair": lambda j: j.replace(b'"llama"', b'"\\ud800"').replace(
        b'"recipe": "', b'"recipe": "\\ud800'
    ),
    "100,000 brackets": lambda j: b"[" * 100_000,
    "100,000 objects": lambda j: b'{"a":' * 100_000,
    "20 nested lists": lambda j: j.replace(b'"lora_alpha": 16', b'"lora_alpha": ' + b"[" * 20 + b"]" * 20),
    "another scale": lambda j: j.replace(b'"scales": [4.0]', b'"scales": [5.0]'),
    "another dropout": lambda j: j.replace(b'"lora_dropout": 0.0', b'"lora_dropout": 0.1'),
}
