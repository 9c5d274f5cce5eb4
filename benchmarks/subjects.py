"""What is measured: SmolLM2 with molora's mixtures and with PEFT's adapters, all armed, on one set of base weights."""

from __future__ import annotations

import atexit
import copy
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import nn

import molora
from molora.adapter.peft_lora_writer import write_peft_lora
from molora.data.builtin.model import model_folder
from molora.surgery.targets import candidates

ROWS, TOKENS = 2, 128
ADAPTERS, RANK = 4, 8
MOLA = {"num_experts": 8, "r": 8, "top_k": 2}
MIXLORA = {"num_experts": 8, "r": 8, "lora_alpha": 16}


@functools.cache
def base() -> Any:
    """SmolLM2-135M-Instruct in float32, frozen."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder("builtin:smollm2"), dtype=torch.float32)
    return model.requires_grad_(False).eval()


def fresh() -> Any:
    """A model of its own on the same weights."""
    return copy.deepcopy(base(), {id(p): p for p in base().parameters()})


def arm(model: nn.Module) -> Any:
    """Seeded non-zero B, so that every expert does something."""
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "lora_B" in name and not bool(p.any()):
                p.copy_(torch.randn(p.shape, generator=g) * 0.01)
    return model


def batch() -> dict[str, torch.Tensor]:
    """2 x 128 tokens with labels."""
    ids = torch.randint(100, 40000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


@functools.cache
def adapter_folders() -> dict[str, str]:
    """Four PEFT LoRA folders on all linears; their numeric names are the only ones that PEFT's X-LoRA runs with."""
    root = Path(tempfile.mkdtemp(prefix="molora-bench-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    linears = {p: c.shape for p, c in candidates(base()).items() if c.layer >= 0}
    for i in range(ADAPTERS):
        g = torch.Generator().manual_seed(10 + i)
        modules = {
            path: (torch.randn(RANK, d, generator=g) / d**0.5, torch.randn(f, RANK, generator=g) * 0.02, 2.0)
            for path, (d, f) in linears.items()
        }
        write_peft_lora(root / str(i), modules=modules, base_model_name="")
    return {str(i): str(root / str(i)) for i in range(ADAPTERS)}


def mola(num_experts: int = 8) -> Any:
    """MoLA: 8 experts of rank 8 on all linears, two chosen."""
    return arm(molora.convert(fresh(), "mola", **{**MOLA, "num_experts": num_experts}))


def mixlora(top_k: int = 2) -> Any:
    """MixLoRA: 8 experts of rank 8 on the feed-forward blocks, plain LoRA on attention."""
    return arm(molora.convert(fresh(), "mixlora", top_k=top_k, **MIXLORA))


def peft_lora() -> Any:
    """PEFT's LoRA of rank 64 (the same number of ranks) on the same linears."""
    config = peft.LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    return arm(peft.get_peft_model(fresh(), config))


def xlora() -> Any:
    """molora's X-LoRA over the four adapters, gates for every module."""
    return molora.convert(fresh(), "xlora", adapters=adapter_folders(), xlora_dropout_p=0.0)


def peft_xlora() -> Any:
    """PEFT's X-LoRA over the same adapters; it forbids the KV cache."""
    model = fresh()
    model.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=model.config.hidden_size,
        adapters=adapter_folders(),
        layerwise_scalings=True,
        xlora_dropout_p=0.0,
    )
    return peft.get_peft_model(model, config)


def same_head(ours: Any, theirs: Any) -> None:
    """Give both X-LoRA models one classifier, so that they compute the same function."""
    heads = [m for m in theirs.base_model.internal_xlora_classifier.layers if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for own, other in zip(ours.molora_router.layers, heads, strict=True):
            own.weight.copy_(other.weight)
            own.bias.copy_(other.bias)


def training_step(model: Any) -> Callable[[], float]:
    """Forward, backward and an AdamW step on the batch."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    inputs = batch()

    def run() -> float:
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return run


def forward(model: Any) -> Callable[[], torch.Tensor]:
    """One forward without gradient or cache."""
    model.eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits

    return run


def generation(model: Any, new_tokens: int) -> Callable[[], torch.Tensor]:
    """Greedy generation of exactly ``new_tokens`` from a prompt of 32."""
    model.eval()
    ids = batch()["input_ids"][:1, :32]
    mask = torch.ones_like(ids)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
            )

    return run


SUBJECTS: dict[str, Callable[[], Callable[[], Any]]] = {
    "base forward": lambda: forward(base()),
    "molora mixlora forward": lambda: forward(mixlora()),
    "molora mola step": lambda: training_step(mola()),
    "peft lora r=64 step": lambda: training_step(peft_lora()),
    "molora xlora forward": lambda: forward(xlora()),
    "peft xlora forward": lambda: forward(peft_xlora()),
    "molora xlora 16 new tokens": lambda: generation(xlora(), 16),
    "peft xlora 16 new tokens": lambda: generation(peft_xlora(), 16),
}
