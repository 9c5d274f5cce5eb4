"""Which base model an adapter was trained on, as far as a config can tell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["fingerprint", "fingerprint_faults"]

# How a model is run, saved or labelled, not what it is; these change between training and use of an adapter.
VOLATILE = {
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "attn_implementation",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "gradient_checkpointing",
    "problem_type",
    "id2label",
    "label2id",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
    "quantization_config",
    "name_or_path",
}
VOLATILE_ENDS = ("dropout", "pdrop", "layerdrop")


KINDS: dict[str, tuple[type, ...]] = {
    "class": (str,),
    "hidden_size": (int, type(None)),
    "num_layers": (int, type(None)),
    "vocab_size": (int, type(None)),
    "config_sha256": (str,),
}


def fingerprint_faults(recorded: Mapping[str, Any]) -> list[str]:
    """What is wrong with a fingerprint out of a file, in words."""
    fits = recorded.keys() == KINDS.keys() and all(type(recorded[k]) in kinds for k, kinds in KINDS.items())
    return [] if fits else [f"fingerprint: got {str(dict(recorded))[:300]}, expected {', '.join(KINDS)}"]


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Class, sizes and config digest of ``model``, and the name it was loaded under. Reads no weight.

    The digest leaves out what may change without another base: versions, dtype, dropout, token ids, quantisation.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    own = config.to_diff_dict() if hasattr(config, "to_diff_dict") else {}
    digest = hashlib.sha256(json.dumps(_stable(own), sort_keys=True, default=_type_name).encode()).hexdigest()
    name = getattr(config, "_name_or_path", None)
    return {
        "base_model_name_or_path": name if isinstance(name, str) and name else None,
        "class": type(model).__name__,
        "hidden_size": _whole(text, "hidden_size"),
        "num_layers": _whole(text, "num_hidden_layers"),
        "vocab_size": _whole(text, "vocab_size"),
        "config_sha256": digest,
    }


def _stable(value: Any) -> Any:
    """Nested dicts without the entries that may change."""
    if isinstance(value, dict):
        kept = {str(k): _stable(v) for k, v in value.items()}
        return {k: v for k, v in kept.items() if k not in VOLATILE and k[0:1] != "_" and not k.endswith(VOLATILE_ENDS)}
    return [_stable(v) for v in value] if isinstance(value, list | tuple) else value


def _whole(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if type(value) is int else None


def _type_name(value: Any) -> str:
    return type(value).__name__
