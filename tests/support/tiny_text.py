"""A tiny causal model with a byte-level tokenizer and a chat template, as a folder; and domain files to go with it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")


def tokenizer() -> Any:
    """One token a byte; padding and the end of a turn are the same token, as in SmolLM2."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT
    return fast


def model_folder(folder: Path) -> Path:
    """Write a random two-layer Llama and its tokenizer."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=len(tokenizer()),
        max_position_embeddings=256,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().eos_token_id,
    )
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def jsonl(path: Path, lines: Iterable[Any]) -> Path:
    """Write one JSON value a line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def domains(folder: Path) -> dict[str, str]:
    """Two domains: counting lines as text, sums as conversations."""
    counting = [{"text": " ".join(str(n + i) for i in range(12))} for n in range(40)]
    sums = [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(7)
        for b in range(6)
    ]
    return {
        "counting": str(jsonl(folder / "counting.jsonl", counting)),
        "sums": str(jsonl(folder / "sums.jsonl", sums)),
    }
