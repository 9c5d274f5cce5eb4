"""Tiny random models of many shapes, ready-made adapters for them, and mixtures that are armed."""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import Tensor, nn

import molora
from molora.config import MoloraConfig
from molora.recipes import RECIPES
from molora.surgery.targets import candidates
from tests.support.traits import ADAPTERS, having, small, traits

SHARED = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GQA = {**SHARED, **TOKENS, "num_key_value_heads": 2}
T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "vocab_size": 64,
    "dropout_rate": 0.0,
}
VISION = {k: SHARED[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
WHISPER = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64, "max_source_positions": 20,
    "max_target_positions": 20,
    "num_mel_bins": 8, "decoder_start_token_id": 1, "dropout": 0.0,
}  # fmt: skip

BUILDERS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA)),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**GQA, head_dim=8)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GQA)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(
            n_embd=32,
            n_layer=2,
            n_head=4,
            vocab_size=64,
            n_positions=128,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            **TOKENS,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SHARED, **TOKENS)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, **TOKENS, decoder_start_token_id=0)),
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(**SHARED, **TOKENS, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
    "vit": lambda: tf.ViTForImageClassification(
        tf.ViTConfig(**VISION, image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    ),
}
# Shapes whose feed-forward block has to be found as well; conversion and one training step are tested on these.
MORE: dict[str, Callable[[], Any]] = {
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**GQA)),
    "gemma3": lambda: tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GQA, head_dim=8)),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
            max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0, **TOKENS,
        )
    ),
    "t5_gated": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(**T5, **TOKENS, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
    ),
    "whisper": lambda: tf.WhisperForConditionalGeneration(tf.WhisperConfig(**WHISPER, **TOKENS)),
    "clip": lambda: tf.CLIPModel(
        tf.CLIPConfig(
            text_config={**SHARED, **TOKENS},
            vision_config={**VISION, "image_size": 16, "patch_size": 8},
            projection_dim=16,
        )
    ),
}  # fmt: skip
ADAPTER_RANKS = (4, 8, 2)  # of the ready-made adapters, by their order
CAUSAL = ("llama", "qwen3", "phi3", "gpt2", "gpt_neox")
TWO_STREAMS = ("t5",)  # of BUILDERS: tokens of an encoder and of a decoder
IMPORTING = having(lambda t: t.imported)  # recipes made of ready-made adapters
# Pairs that the design refuses, with the error that the matrix expects: one set of gates is for one stream of tokens.
REFUSED = {(r, n): molora.errors.TargetError for r in having(lambda t: t.model_wide) for n in TWO_STREAMS}


@functools.cache
def _prototype(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = {**BUILDERS, **MORE}[name]()
    for p in model.parameters():
        if p.ndim > 1 and p.std() < 0.05:
            p.data.mul_(3.0)  # wider than the 0.02 of most fresh models, so that differences show
    return model.eval()


def base_model(name: str, trainable: bool = False) -> Any:
    """A fresh copy of the tiny model ``name``; the same weights every time.

    Frozen, as a mixture's base is: PyTorch chooses a product's path also by ``requires_grad``, so bits are equal only
    under equal flags. ``trainable`` gives the flags of ``from_pretrained``, to test that conversion takes them away and
    ``unload`` gives them back.
    """
    return copy.deepcopy(_prototype(name)).requires_grad_(trainable)


def batch(name: str, rows: int = 2, length: int = 9, seed: int = 0, labels: bool = True) -> dict[str, Tensor]:
    """Inputs with labels for ``name``."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 64, (rows, length), generator=g)
    classes = torch.arange(rows) % 2
    if name == "vit":
        out = {"pixel_values": torch.randn(rows, 3, 16, 16, generator=g), "labels": classes}
    elif name == "whisper":
        out = {"input_features": torch.randn(rows, 8, 40, generator=g), "labels": ids[:, :5]}
    elif name == "clip":
        out = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(rows, 3, 16, 16, generator=g),
        }
    elif name == "bert":
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": classes}
    elif name in ("t5", "t5_gated"):
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, :5].clone()}
    else:
        out = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    return out if labels else {k: v for k, v in out.items() if k != "labels"}


def write_adapter(
    folder: Path,
    name: str,
    *,
    r: int,
    seed: int,
    alpha: float = 16,
    only: tuple[str, ...] = (),
    rslora: bool = False,
) -> Path:
    """An ordinary PEFT LoRA folder for the tiny model ``name``, with random A and B on its layers' linears."""
    folder.mkdir(parents=True, exist_ok=True)
    g = torch.Generator().manual_seed(seed)
    linears = {p: c for p, c in candidates(base_model(name)).items() if c.layer >= 0}
    chosen = {p: c for p, c in linears.items() if not only or p.rpartition(".")[2] in only}
    tensors = {}
    for p, c in chosen.items():
        tensors[f"base_model.model.{p}.lora_A.weight"] = torch.randn(r, c.shape[0], generator=g) / c.shape[0] ** 0.5
        tensors[f"base_model.model.{p}.lora_B.weight"] = torch.randn(c.shape[1], r, generator=g) * 0.1
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "", "r": r, "lora_alpha": alpha, "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({p.rpartition(".")[2] for p in chosen}), "use_rslora": rslora, "use_dora": False,
        "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}, "inference_mode": True, "task_type": None,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def adapters(root: Path, name: str) -> dict[str, str]:
    """Three adapters of unequal rank for ``name``: the names PEFT stumbles over are among them."""
    out = {}
    for i, (key, r) in enumerate(zip(ADAPTERS, ADAPTER_RANKS, strict=True)):
        folder = root / name / key
        if not folder.exists():
            write_adapter(folder, name, r=r, seed=10 + i, rslora=key == "math")
        out[key] = str(folder)
    return out


KERNEL = os.environ.get("MOLORA_TEST_KERNEL")  # every site on this kernel, in the processes of test_interpreted.py

SMALL: dict[str, dict[str, Any]] = {recipe: small(recipe) for recipe in RECIPES}  # each recipe's own, without adapters


def options(recipe: str, name: str, root: Path, **more: Any) -> dict[str, Any]:
    """Options of the small version of ``recipe`` on the tiny model ``name``."""
    own = {"adapters": adapters(root, name)} if traits(recipe).imported else {}
    own |= {"kernel": KERNEL} if KERNEL else {}
    return {**SMALL[recipe], **own, **more}


def config(recipe: str, name: str, root: Path, **more: Any) -> MoloraConfig:
    """The config of the small version of ``recipe`` on the tiny model ``name``."""
    return RECIPES[recipe](**options(recipe, name, root, **more))


def arm(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give B and the routers seeded non-zero values: at B = 0 most equalities hold for nothing."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if name.endswith("lora_B") and not bool(p.any()):
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
            elif "router" in name and p.requires_grad:  # not the base's own
                p.copy_(torch.randn(p.shape, generator=g) / max(*p.shape[-1:], 1, 1) ** 0.5)
        for name, b in sorted(model.named_buffers()):
            if name.endswith("select_bias"):
                b.copy_(torch.randn(b.shape, generator=g) * 0.05)
    return model


def converted(recipe: str, name: str, root: Path, armed: bool = True, **more: Any) -> Any:
    """The tiny model ``name`` with the small version of ``recipe`` on it, armed unless told otherwise."""
    model = molora.convert(base_model(name), recipe, **options(recipe, name, root, **more))
    return arm(model) if armed else model


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The model's main output tensor (logits), without gradient and without labels."""
    plain = {k: v for k, v in inputs.items() if k not in ("labels", "task_ids")}
    if model.config.is_encoder_decoder:  # type: ignore[union-attr]
        plain["decoder_input_ids"] = inputs["labels"]
    with torch.no_grad():
        out = model(**plain)
    logits = getattr(out, "logits", None)
    return logits if logits is not None else out.logits_per_text
