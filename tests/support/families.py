"""Base models of many families, tiny and random: the rows of the README's table of bases."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import Tensor

from tests.support import tiny
from tests.support.quantised import QUANTISED, quantise
from tests.support.tiny import GQA, TOKENS, VISION

IMAGE = 60  # the token that stands for a patch of an image
# Experts of the base itself, as many as fit: two chosen of four.
MOE = {**GQA, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


class Family(NamedTuple):
    """A row: how the README calls it, how a base is made, and which of tiny's batches it takes.

    ``cached``: whether the bare base generates the same with its cache as without, so that a mixture could.
    ``note``: the key of a note that belongs to every "yes" of the row. ``parameters``: what is asked for as
    ``target_parameters``, beside the usual linears.
    """

    title: str
    build: Callable[[], Any]
    batch: str = "llama"
    cached: bool = True
    note: str = ""
    parameters: tuple[str, ...] = ()


def _tiny(name: str, title: str) -> Family:
    return Family(title, functools.partial(tiny.base_model, name), name)


def _bart() -> Any:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    config = tf.BartConfig(d_model=32, vocab_size=64, max_position_embeddings=128, **sizes, **NO_DROPOUT, **TOKENS)
    return tf.BartForConditionalGeneration(config)


def _llava() -> Any:
    vision = tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**GQA), image_token_id=IMAGE)
    )


def _deepseek() -> Any:
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    groups = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
    groups["num_key_value_heads"] = 4
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**{**MOE, **latent, **groups}))


def _qwen3_next() -> Any:
    heads = {
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    }
    own = {"num_experts": 4, "shared_expert_intermediate_size": 24, "head_dim": 8}
    kinds = ["linear_attention", "full_attention"]
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**MOE, **heads, **own, layer_types=kinds))


def _jamba() -> Any:
    own = {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 1}
    mamba = {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
    return tf.JambaForCausalLM(tf.JambaConfig(**GQA, **own, **mamba, num_experts_per_tok=2, expert_layer_period=2))


STATE = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, **TOKENS}

FAMILIES: dict[str, Family] = {
    "llama": _tiny("llama", "Llama"),
    "mistral": _tiny("mistral", "Mistral"),
    "qwen3": _tiny("qwen3", "Qwen3"),
    "gemma3": _tiny("gemma3", "Gemma3"),
    "phi3": _tiny("phi3", "Phi-3 (fused projections)"),
    "gpt2": _tiny("gpt2", "GPT-2 (Conv1D)"),
    "gpt_neox": _tiny("gpt_neox", "GPT-NeoX"),
    "opt": _tiny("opt", "OPT"),
    "mixtral": Family(
        "Mixtral", lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**GQA, num_local_experts=4, num_experts_per_tok=2))
    ),
    "olmoe": Family("OLMoE", lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**GQA, num_experts=4, num_experts_per_tok=2))),
    "qwen3_moe": Family(
        "Qwen3-MoE", lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, num_experts=4, head_dim=8))
    ),
    "deepseek": Family("DeepSeek-V3 (latent attention, shared expert)", _deepseek),
    "gpt_oss": Family(
        "gpt-oss",
        lambda: tf.GptOssForCausalLM(
            tf.GptOssConfig(**GQA, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16)
        ),
    ),
    "qwen3_next": Family("Qwen3-Next (gated delta net, MoE)", _qwen3_next),
    "mamba": Family("Mamba", lambda: tf.MambaForCausalLM(tf.MambaConfig(**STATE, state_size=4)), note="fused"),
    "mamba2": Family(
        "Mamba2",
        lambda: tf.Mamba2ForCausalLM(tf.Mamba2Config(**STATE, state_size=4, num_heads=8, head_dim=8, n_groups=2)),
        note="fused",
    ),
    "jamba": Family("Jamba (Mamba, attention, MoE)", _jamba),
    "rwkv": Family(
        "RWKV", lambda: tf.RwkvForCausalLM(tf.RwkvConfig(**STATE, attention_hidden_size=32)), cached=False, note="state"
    ),
    "recurrent_gemma": Family(
        "RecurrentGemma",
        lambda: tf.RecurrentGemmaForCausalLM(
            tf.RecurrentGemmaConfig(**{**GQA, "num_hidden_layers": 3}, lru_width=32)
        ),
    ),
    "t5": _tiny("t5", "T5"),
    "t5_gated": _tiny("t5_gated", "T5 v1.1 (gated)"),
    "bart": Family("BART", _bart, "t5"),
    "whisper": _tiny("whisper", "Whisper"),
    "bert": _tiny("bert", "BERT"),
    "vit": _tiny("vit", "ViT"),
    "clip": _tiny("clip", "CLIP"),
    "llava": Family("LLaVA", _llava, "llava"),
}  # fmt: skip

# Bases with stacked experts of their own, which are adapted, too.
FAMILIES |= {
    f"{name}_experts": FAMILIES[name]._replace(
        title=f"{FAMILIES[name].title.partition(' (')[0]}, its own experts too (`target_parameters`)",
        parameters=("experts.gate_up_proj", "experts.down_proj"),
    )
    for name in ("mixtral", "olmoe", "qwen3_moe", "deepseek", "gpt_oss")
}


def _wide() -> Any:
    """Llama with widths that are whole blocks of every quantisation."""
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**GQA, "hidden_size": 64, "intermediate_size": 128}))


FAMILIES |= {
    name: Family(
        f"Llama, {q.title}",
        functools.partial(quantise, _wide, name),
        cached=name != "gguf",
        note="blocks" if name == "gguf" else "",
    )
    for name, q in QUANTISED.items()
}


@functools.cache
def _prototype(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(sum(map(ord, name)))
        model = FAMILIES[name].build()
    return model.eval()


def base(name: str) -> Any:
    """A fresh copy of the base of family ``name``; the same weights every time, frozen as ``tiny.base_model`` says."""
    return copy.deepcopy(_prototype(name)).requires_grad_(False)


def inputs(name: str) -> dict[str, Tensor]:
    """A batch with labels for family ``name``."""
    kind = FAMILIES[name].batch
    if kind != "llava":
        return tiny.batch(kind)
    batch = tiny.batch("llama", length=12)
    ids = batch["input_ids"].clamp(max=IMAGE - 1)
    ids[:, 2:6] = IMAGE  # four patches of a 16 x 16 image
    return {**batch, "input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(2, 3, 16, 16)}
