"""Adapters of each recipe as one format's code wrote them, on a base that needs no random numbers, with their outputs.

``python -m tests.support.format_fixture tests/fixtures/format_1_models`` wrote those folders. A released format
is never written anew.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

import molora
from tests.support.tiny import arm
from tests.support.traits import takes

IDS = torch.tensor([[3, 7, 11, 5]])
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 2},
    "mixlora": {"r": 1, "num_experts": 3, "target_modules": ["q_proj", "gate_proj", "down_proj"]},
    "mola": {"r": 1, "num_experts": 3, "target_modules": ["k_proj", "up_proj"]},
    "smora": {"r": 4, "top_k": 2, "target_modules": ["v_proj", "up_proj"]},
    "llava_mole": {"r": 1, "target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]},
    "xlora": {"xlora_depth": 2, "xlora_size": 4, "top_k_lora": 2},
    "meteora": {"top_k": 2},
}


def base() -> Any:
    """A Llama of one layer whose weights are sines, the same for every version of everything."""
    config = tf.LlamaConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=16, intermediate_size=12,
        max_position_embeddings=32, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for k, (_, p) in enumerate(sorted(model.named_parameters())):
            wave = torch.sin(torch.arange(1, p.numel() + 1, dtype=torch.float64) * (0.37 + 0.01 * k)) * 0.6
            p.copy_((wave + (p.ndim == 1)).view(p.shape))
    return model


def outputs(model: Any) -> torch.Tensor:
    """Logits of a short row."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def ready_made(root: Path) -> dict[str, str]:
    """Three PEFT LoRA folders of rank 1 on two of the base's linears."""
    shapes = {"model.layers.0.self_attn.q_proj": (8, 8), "model.layers.0.mlp.down_proj": (12, 8)}
    g = torch.Generator().manual_seed(0)
    for name in "abc":
        (root / name).mkdir()
        tensors = {
            f"base_model.model.{p}.lora_{x}.weight": torch.randn((1, i) if x == "A" else (o, 1), generator=g)
            for p, (i, o) in shapes.items()
            for x in "AB"
        }
        save_file(tensors, root / name / "adapter_model.safetensors")
        (root / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    return {name: str(root / name) for name in "abc"}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        adapters = ready_made(Path(folder))
        for recipe, options in OPTIONS.items():
            own = {**options, "adapters": adapters} if takes(recipe, "adapters") else options
            model = arm(molora.convert(base(), recipe, **own))
            place = Path(sys.argv[1]) / recipe
            model.save_pretrained(place)
            (place / "README.md").unlink()
            (place / "outputs.json").write_text(
                json.dumps([float(f"{x:.8g}") for x in outputs(model).flatten().tolist()])
            )
