"""What a forward was called with, as far as a recorder of routing has to know: rows, token ids, continuations."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn

__all__ = ["ENCODER", "continues", "digest_of", "main_input", "streams"]

ENCODER, DECODER = "attention_mask", "decoder_attention_mask"  # streams of tokens have the names of their masks


def digest_of(key: str | int | Tensor) -> int:
    """64 bits that depend on nothing but the key."""
    if isinstance(key, Tensor):
        plain = key.detach().to("cpu").contiguous()
        data = (plain.float() if plain.is_floating_point() else plain.long()).numpy().tobytes()
    else:
        data = f"{type(key).__name__}:{key}".encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def main_input(model: nn.Module, arguments: dict[str, Any]) -> Tensor | None:
    """The tensor whose rows are the documents; in the steps of a decoder, its own."""
    names = ("input_ids", "inputs_embeds", getattr(model, "main_input_name", "input_ids"), "decoder_input_ids")
    return next((v for v in map(arguments.get, names) if isinstance(v, Tensor)), None)


def continues(arguments: dict[str, Any]) -> bool:
    """Whether the forward goes on with earlier tokens: it has a filled cache, or the output of an encoder."""
    length = getattr(arguments.get("past_key_values"), "get_seq_length", None)
    return arguments.get("encoder_outputs") is not None or (length is not None and int(length()) > 0)


def streams(model: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Token ids by stream; a decoder's from the labels where it makes them so."""
    out = {ENCODER: arguments.get("input_ids"), DECODER: arguments.get("decoder_input_ids")}
    labels, shift = arguments.get("labels"), getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if out[DECODER] is None and labels is not None and shift is not None:
        out[DECODER] = shift(labels=labels)
    return {k: v for k, v in out.items() if isinstance(v, Tensor)}
