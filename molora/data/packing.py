"""Packing: several short texts in one row, each as if it stood alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from molora.config import MoloraConfig
from molora.data.examples import IGNORED, Example
from molora.errors import ConfigError
from molora.routers import GATES

__all__ = ["check_packing", "pack"]

OPEN = 32  # rows that wait for a text that still fits; more fill a little better and mix the order up further
# Relative error of a token's logits, the median over tokens. SmolLM2-135M in bfloat16: 0.005 to 0.02 (single tokens: up
# to 0.6); GPT-2 with wrong positions: above 0.6.
ROUNDING, ROUNDING_HALF = 1e-3, 0.1
PROBE = (7, 9)  # tokens of the two texts that are tried


def pack(rows: Sequence[Example], max_length: int) -> list[Example]:
    """Rows of up to ``max_length`` tokens, made of whole rows: each goes into the first one where it still fits.

    The first token of every text is no label: it would be predicted from the text before.
    """
    done: list[list[Example]] = []
    open_rows: list[tuple[int, list[Example]]] = []  # tokens and texts
    for row in rows:
        size = len(row["input_ids"])
        at = next((i for i, (used, _) in enumerate(open_rows) if used + size <= max_length), None)
        if at is not None:
            used, texts = open_rows[at]
            texts.append(row)
            open_rows[at] = used + size, texts
            continue
        if len(open_rows) == OPEN:
            fullest = max(range(OPEN), key=lambda i: open_rows[i][0])
            done.append(open_rows.pop(fullest)[1])
        open_rows.append((size, [row]))
    return [_joined(texts) for texts in (*done, *(texts for _, texts in open_rows))]


def _joined(texts: Sequence[Example]) -> Example:
    row = Example(
        input_ids=list(chain.from_iterable(t["input_ids"] for t in texts)),
        labels=list(chain.from_iterable([IGNORED, *t["labels"][1:]] for t in texts)),
        position_ids=list(chain.from_iterable(range(len(t["input_ids"])) for t in texts)),
    )
    if "task_ids" in texts[0]:
        row["task_ids"] = [t["task_ids"] for t in texts for _ in t["input_ids"]]  # type: ignore[misc]
    return row


def check_packing(model: Any, config: MoloraConfig) -> None:
    """See by trying that ``model`` computes a text in a packed row as it does the text alone.

    Raises:
        ConfigError: the model looks at the text before, or the mixture counts tokens per row.
    """
    name = type(model).__name__
    if any(GATES[p.gate.kind].couples_tokens(p.gate) for p in config.placements):
        raise ConfigError("packing: got experts with a capacity per row, which texts in one row would share; leave one")
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise ConfigError("packing: is checked by running the model, which ZeRO-3 took apart already; use ZeRO-2")
    g, (before, after) = torch.Generator().manual_seed(0), PROBE
    vocabulary = model.get_input_embeddings().num_embeddings
    first, other, text = (torch.randint(vocabulary, (1, n), generator=g) for n in (before, before, after))
    positions = torch.cat([torch.arange(before), torch.arange(after)]).unsqueeze(0)
    try:
        packed, changed = (_logits(model, torch.cat([f, text], 1), positions)[:, before:] for f in (first, other))
        alone = _logits(model, text, None)
    except (TypeError, ValueError, RuntimeError, IndexError) as e:
        raise ConfigError(f"packing: {name} cannot run a packed row: {e}; set packing: false") from e
    # Masked tokens have a weight of exactly 0, so what they are changes no bit; another shape may change roundings.
    off = ((packed - alone).norm(dim=-1) / alone.norm(dim=-1)).median()
    if not torch.equal(packed, changed) or off > (ROUNDING if model.dtype.itemsize >= 4 else ROUNDING_HALF):
        raise ConfigError(
            f"packing: {name} does not keep the texts of a packed row apart (transformers takes the borders from "
            "position_ids, which this model does not use for them); set packing: false"
        )


@torch.no_grad()
def _logits(model: Any, ids_BS: Tensor, position_ids: Tensor | None) -> Tensor:
    training = model.training
    model.eval()
    try:
        more = {} if position_ids is None else {"position_ids": position_ids.to(model.device)}
        logits: Tensor = model(input_ids=ids_BS.to(model.device), use_cache=False, **more).logits
    finally:
        model.train(training)
    return logits.float()
