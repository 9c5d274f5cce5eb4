"""X-LoRA: ready-made LoRA adapters mixed by a head that reads the hidden states of a first pass."""

from __future__ import annotations

import os
from collections.abc import Mapping

from molora.config import GateConfig, MoloraConfig, RouterConfig
from molora.recipes.common import Common, folders, recipe

__all__ = ["xlora"]


@recipe(released={"layerwise_scalings": False}, tiny={"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0})
def xlora(
    *,
    adapters: Mapping[str, str | os.PathLike[str]] | None = None,
    xlora_depth: int = 1,
    xlora_size: int = 2048,
    xlora_dropout_p: float = 0.2,
    layerwise_scalings: bool = True,
    softmax_temperature: float = 1.0,
    top_k_lora: int | None = None,
    enable_softmax: bool = True,
    enable_softmax_topk: bool = False,
    scaling_pass_value: float = 0.0,
    global_scaling_weight: float = 1.0,
    use_trainable_adapters: bool = False,
    common: Common,
) -> MoloraConfig:
    """X-LoRA (Buehler & Buehler 2024, arXiv 2402.07148, sec. II): ``y = W x + sum_e g_e(h) s_e B_e A_e x``.

    h is the last hidden state of a first pass with the adapters scaled by ``scaling_pass_value`` (0: the base model).
    A head of ``xlora_depth`` linears turns it into gates per token and, with ``layerwise_scalings``, per module.
    ``top_k_lora`` keeps the K largest gates, without renormalising; ``enable_softmax_topk`` takes a softmax over
    them. Only the head trains, unless ``use_trainable_adapters``. ``adapters``: PEFT LoRA folders; those of PEFT's
    other methods become LoRA by ``molora.interop.to_lora.to_lora(base_model, folder, out_folder, rank=16)``.
    """
    mode = "softmax" if enable_softmax_topk and top_k_lora is not None else "none"
    placement = common.placement(
        imported=True,
        global_scale=float(global_scaling_weight),
        train_experts=use_trainable_adapters,
        router=RouterConfig(
            kind="hidden",
            scope="model",
            bias=True,
            depth=xlora_depth,
            size=xlora_size,
            dropout=xlora_dropout_p,
            layerwise=layerwise_scalings,
            scaling_pass_value=float(scaling_pass_value),
        ),
        gate=GateConfig(
            activation="softmax" if enable_softmax else "identity",
            temperature=softmax_temperature,
            top_k=top_k_lora,
            renormalize=mode,
        ),
    )
    return common.config("xlora", placement, adapters=folders("xlora", adapters))
