"""Run documents of several domains through a converted model and count where their tokens go."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import load, save
from transformers import PreTrainedModel

from molora.data.examples import Example
from molora.errors import ConfigError
from molora.eval.counting.counter import routed_sites
from molora.eval.counting.stats import RoutingStats, merge
from molora.eval.counting.watch import collect_routing
from molora.eval.ledger import Ledger, Track, quiet
from molora.eval.scoring.losses import batches

__all__ = ["check_choice", "record_domains", "token_texts"]

PIECE = 256  # documents that are counted together before the ledger keeps them
Document = Sequence[Example]  # the rows of one text


def check_choice(model: PreTrainedModel) -> None:
    """Raise a :class:`ConfigError` unless the model has a router that chooses among at least two experts."""
    if not routed_sites(model):
        raise ConfigError(
            "routing: no router of this model has a choice: it is a plain LoRA, or each of its routers has one expert; "
            "there is nothing to see. Take a mixture of at least two experts"
        )


@torch.no_grad()
def record_domains(
    model: PreTrainedModel,
    documents: Mapping[str, Sequence[Document]],
    pad_token_id: int,
    *,
    seed: int = 0,
    size: int = 8,
    samples: int = 8,
    sample_tokens: int = 128,
    ledger: Ledger | None = None,
    track: Track = quiet,
) -> RoutingStats:
    """Counts of all routers over ``documents`` (by domain, each a list of rows), and ``samples`` documents a domain.

    What ``ledger`` has is not run again. ``size``: rows of a batch; it changes no count but those by batch.

    Raises:
        ConfigError: a model that was not converted, or without a choice of experts.
    """
    with collect_routing(model, seed=seed, samples=samples, sample_tokens=sample_tokens) as empty:
        check_choice(model)
    model.eval()
    ledger, found = ledger or Ledger(), RoutingStats.from_state(*empty.state())
    for domain, own in documents.items():
        for start in range(0, len(own), PIECE):

            def count(domain: str = domain, part: Sequence[Document] = own[start : start + PIECE]) -> str:
                rows = [row for document in part for row in document]
                keys = [_key(document) for document in part for _ in document]
                with collect_routing(model, seed=seed, samples=samples, sample_tokens=sample_tokens) as stats:
                    for chunk, batch in track(batches(rows, pad_token_id, size), f"routing of {domain}"):
                        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
                        with stats.batch(domain, documents=[keys[i] for i in chunk]):
                            model(**inputs)
                return _packed(stats)

            found = merge(found, _unpacked(ledger.piece(f"routing {domain} {start}", count)))
    return found


def _key(document: Document) -> str:
    """The same for the same text, whatever else is recorded."""
    return hashlib.blake2b(json.dumps([row["input_ids"] for row in document]).encode(), digest_size=16).hexdigest()


def _packed(stats: RoutingStats) -> str:
    """Counts as text, for a line of a ledger."""
    tensors, meta = stats.state()
    return base64.b64encode(save(tensors, {"state": json.dumps(meta)})).decode()


def _unpacked(text: str) -> RoutingStats:
    raw = base64.b64decode(text)
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])  # safetensors' own layout
    return RoutingStats.from_state(load(raw), json.loads(header["__metadata__"]["state"]))


def token_texts(section: Mapping[str, Any], tokenizer: Any) -> dict[str, str]:
    """The text of every token id in a section "routing", with the space that sentencepiece takes off a single token."""
    ids = {i for sample in section["samples"] for own in sample["tokens"].values() for i in own}
    ids |= {word[0] for table in section["vocabulary"] for words in table["words"] for word in words}
    known = sorted(i for i in ids if 0 <= i < len(tokenizer))  # models may have more rows than the tokenizer ids
    out = {}
    for i, token in zip(known, tokenizer.convert_ids_to_tokens(known), strict=True):
        text = str(tokenizer.decode([i]))
        out[str(i)] = f" {text}" if str(token).startswith("▁") and not text.startswith(" ") else text
    return out
