"""Checkpoints in the layouts of other projects, written by hand on the tiny Llama: their keys, and random weights.

Written from what those projects' code saves, without molora's importers; the tests' oracles read the same tensors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.tiny import base_model, write_adapter

ATTENTION = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
MLP = {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}
LINEARS = {f"self_attn.{n}": s for n, s in ATTENTION.items()} | {f"mlp.{n}": s for n, s in MLP.items()}
OLD = {"gate_proj": "w1_proj", "down_proj": "w2_proj", "up_proj": "w3_proj"}
Tensors = dict[str, Tensor]


class Draw:
    """Seeded A, B and gates that are far from zero."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * std

    def lora(self, key: str, sizes: tuple[int, int], r: int, letters: str = "lora_{}.weight") -> Tensors:
        A, B = self.normal(r, sizes[0], std=sizes[0] ** -0.5), self.normal(sizes[1], r, std=0.2)
        return {f"{key}.{letters.format('A')}": A, f"{key}.{letters.format('B')}": B}


def write(folder: Path, config: dict[str, Any] | None, tensors: Tensors, name: str) -> Path:
    """``config`` as adapter_config.json (none without), ``tensors`` as ``name``: a pickle or safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file({k: t.contiguous() for k, t in tensors.items()}, folder / name)
    else:
        torch.save(tensors, folder / name)
    return folder


def mixlora(*, experts: int = 3, r: int = 2, attention_r: int = 2, old: bool = False, seed: int = 5) -> Tensors:
    """MoE-PEFT's MixLoRA, or with ``old`` the first releases' keys (w1, w2, w3; gate and experts beside the block)."""
    draw, out = Draw(seed), {}
    for i in range(2):
        layer = f"mixlora.layers.{i}"
        out[f"{layer}.gate.weight" if old else f"{layer}.mlp.moe_gate.weight"] = draw.normal(experts, 32)
        for name, sizes in MLP.items():
            for e in range(experts):
                key = f"{layer}.experts.{e}.{OLD[name]}" if old else f"{layer}.mlp.{name}.experts.{e}"
                out |= draw.lora(key, sizes, r)
        for name, sizes in ATTENTION.items():
            out |= draw.lora(f"{layer}.self_attn.{name}", sizes, attention_r)
    return out


def mixlora_config(**own: Any) -> dict[str, Any]:
    """What export() writes beside them."""
    return {
        "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "peft_type": "MIXLORA", "bias": "none",
        "r": 2, "lora_alpha": 6, "lora_dropout": 0.05, "target_modules": [*ATTENTION, *MLP],
        "routing_strategy": "mixlora", "num_experts": 3, "top_k": 2, **own,
    }  # fmt: skip


def moe_peft(kind: str, experts: int = 3, r: int = 2, seed: int = 9) -> Tensors:
    """MoE-PEFT's "mola" and "loramoe": a router and experts on each linear; "loramoe" has plain LoRA on attention."""
    draw, out = Draw(seed), {}
    for i in range(2):
        for name, sizes in LINEARS.items():
            key = f"{kind}.layers.{i}.{name}"
            if kind == "loramoe" and name.startswith("self_attn"):
                out |= draw.lora(key, sizes, r)
                continue
            out[f"{key}.moe_gate.weight"] = draw.normal(experts, sizes[0])
            for e in range(experts):
                out |= draw.lora(f"{key}.experts.{e}", sizes, r)
    return out


def moe_peft_config(kind: str, **own: Any) -> dict[str, Any]:
    """What export() writes beside them: only "mola" has a top_k."""
    more = {"peft_type": kind.upper(), "routing_strategy": kind, **({"top_k": 2} if kind == "mola" else {})}
    shared = {k: v for k, v in mixlora_config().items() if k not in ("top_k", "peft_type", "routing_strategy")}
    return {**shared, **more, **own}


MOLA_EXPERTS, MOLA_RANKS = (2, 4), (3, 2)


def mola(seed: int = 6) -> Tensors:
    """MoLA: experts and a router on every linear; two experts of rank 3 on layer 0, four of rank 2 on layer 1."""
    draw, out = Draw(seed), {}
    for i, (E, r) in enumerate(zip(MOLA_EXPERTS, MOLA_RANKS, strict=True)):
        for name, sizes in LINEARS.items():
            key = f"base_model.model.model.layers.{i}.{name}"
            for e in range(E):
                out |= draw.lora(key, sizes, r, f"lora_{{}}_{e}.weight")
            out[f"{key}.router.router.weight"] = draw.normal(E, sizes[0])
    return out


def mola_config(**own: Any) -> dict[str, Any]:
    """MoLA's config: PEFT's of its time, with a rank for each of 32 layers."""
    return {
        "base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None, "lora_alpha": 5,
        "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": [*MOLA_RANKS] + [8] * 30,
        "target_modules": [*ATTENTION, *MLP], "task_type": "CAUSAL_LM", **own,
    }  # fmt: skip


def meteora(experts: int = 3, r: int = 2, seed: int = 7) -> Tensors:
    """MeteoRA: the whole base under PEFT's prefix, each linear with its base layer, a gate and all experts packed."""
    draw, out = Draw(seed), {}
    linears = {f"model.layers.{i}.{n}": s for i in range(2) for n, s in LINEARS.items()}
    for name, t in base_model("llama").state_dict().items():
        path = name.removesuffix(".weight")
        out[f"base_model.model.{path}.base_layer.weight" if path in linears else f"base_model.model.{name}"] = t
    for path, sizes in linears.items():
        out[f"base_model.model.{path}.moe_gate.weight"] = draw.normal(experts, sizes[0], std=0.3)
        out |= draw.lora(f"base_model.model.{path}", sizes, experts * r)
    return out


def loras(root: Path, ranks: dict[str, int]) -> dict[str, Path]:
    """PEFT LoRA folders of these names and ranks."""
    return {
        n: write_adapter(root / n, "llama", r=r, seed=30 + i, alpha=6 + i) for i, (n, r) in enumerate(ranks.items())
    }


def xlora_config(**own: Any) -> dict[str, Any]:
    """The xlora package's config as its latest release writes it."""
    return {
        "hidden_size": 32, "base_model_id": "org/base", "adapters": ["math", "code"], "enable_softmax": True,
        "enable_softmax_topk": False, "layerwise_scalings": True, "xlora_depth": 2, "xlora_size": 16,
        "enable_relu_and_dropout": True, "use_bias": True, "xlora_dropout_p": 0.2, "use_trainable_adapters": False,
        "softmax_temperature": 0.5, "top_k_lora": None, "scaling_pass_value": 0.0, "global_scaling_weight": 0.8, **own,
    }  # fmt: skip


def xlora_head(slots: list[str], gates: int, bias: bool = True, seed: int = 8) -> Tensors:
    """The package's classifier: linears at ``slots`` of width 16, the last with ``gates`` outputs."""
    draw, out, width = Draw(seed), {}, 32
    for slot in slots:
        size = gates if slot == slots[-1] else 16
        out[f"{slot}.weight"] = draw.normal(size, width, std=2 * width**-0.5)
        out |= {f"{slot}.bias": draw.normal(size)} if bias else {}
        width = size
    return out


def write_xlora(folder: Path, root: Path, config: dict[str, Any], head: Tensors, pickle: bool = False) -> Path:
    """Config, classifier and both experts' folders, as the package leaves them; experts in ``root``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "xlora_config.json").write_text(json.dumps(config))
    write(folder, None, head, "xlora_classifier.pt" if pickle else "xlora_classifier.safetensors")
    loras(root, {"math": 4, "code": 2})
    return folder
