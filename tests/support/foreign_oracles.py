"""The published equations on the plain tiny Llama, by forward hooks, on the tensors of foreign_folders.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.support.foreign_folders import ATTENTION, LINEARS, MLP, Tensors
from tests.support.tiny import base_model

IDS = torch.arange(3, 17).view(2, 7)
Formula = Callable[[Tensor, Tensor], Tensor]  # of a module's input and output


@contextlib.contextmanager
def hooked(base: Any, formulas: dict[str, Formula]) -> Iterator[None]:
    """Within the block the modules named give ``formula(x, y)`` instead of y."""
    handles = [
        base.get_submodule(p).register_forward_hook(lambda _, args, y, f=f: f(args[0], y)) for p, f in formulas.items()
    ]
    try:
        yield
    finally:
        for h in handles:
            h.remove()


def logits(formulas: dict[str, Formula]) -> Tensor:
    """The base's logits with these modules computing something else."""
    base = base_model("llama")
    with torch.no_grad(), hooked(base, formulas):
        return base(input_ids=IDS).logits


def top(p: Tensor, k: int) -> Tensor:
    """p (..., E) with all but the k largest set to zero, divided by their sum."""
    kept = torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0) * p
    return kept / kept.sum(-1, keepdim=True)


def delta(t: Tensors, key: str, x: Tensor, letters: str = "lora_{}.weight") -> Tensor:
    """B A x of one LoRA in the file."""
    return x @ t[f"{key}.{letters.format('A')}"].t() @ t[f"{key}.{letters.format('B')}"].t()


def mixlora(
    t: Tensors, weights: Callable[[Tensor], Tensor], scale: float, attention_scale: float, old_names: dict[str, str]
) -> Tensor:
    """arXiv 2404.15159 eq. 3-7: sum_e w_e(x) W2_e(act(W1_e x) * W3_e x), each W_e z = W z + scale B_e A_e z."""
    base = base_model("llama")

    def block(i: int) -> Formula:
        mlp, key = base.model.layers[i].mlp, f"mixlora.layers.{i}"
        router = t[f"{key}.gate.weight" if old_names else f"{key}.mlp.moe_gate.weight"]

        def own(name: str, e: int, z: Tensor) -> Tensor:
            place = f"{key}.experts.{e}.{old_names[name]}" if old_names else f"{key}.mlp.{name}.experts.{e}"
            return z @ getattr(mlp, name).weight.t() + scale * delta(t, place, z)

        def expert(e: int, x: Tensor) -> Tensor:
            return own("down_proj", e, torch.nn.functional.silu(own("gate_proj", e, x)) * own("up_proj", e, x))

        def formula(x: Tensor, _: Tensor) -> Tensor:
            w = weights(torch.softmax(x @ router.t(), -1))
            return sum(w[..., e : e + 1] * expert(e, x) for e in range(len(router)))  # type: ignore[return-value]

        return formula

    formulas = {f"model.layers.{i}.mlp": block(i) for i in range(2)}
    for i in range(2):
        for n in ATTENTION:
            key = f"mixlora.layers.{i}.self_attn.{n}"
            formulas[f"model.layers.{i}.self_attn.{n}"] = lambda x, y, k=key: y + attention_scale * delta(t, k, x)
    assert MLP.keys() == {"gate_proj", "up_proj", "down_proj"}
    return logits(formulas)


def mola(t: Tensors, top_k: tuple[int, int], alpha: float) -> Tensor:
    """arXiv 2402.08562 eq. 5-7 on each linear: softmax, top-K, sum to 1; scale alpha / r of the layer."""
    formulas: dict[str, Formula] = {}
    for i in range(2):
        for n in LINEARS:
            key = f"base_model.model.model.layers.{i}.{n}"
            r = t[f"{key}.lora_A_0.weight"].shape[0]

            def formula(x: Tensor, y: Tensor, key: str = key, k: int = top_k[i], s: float = alpha / r) -> Tensor:
                w = top(torch.softmax(x @ t[f"{key}.router.router.weight"].t(), -1), k)
                parts = [w[..., e : e + 1] * s * delta(t, key, x, f"lora_{{}}_{e}.weight") for e in range(w.shape[-1])]
                return y + sum(parts)

            formulas[f"model.layers.{i}.{n}"] = formula
    return logits(formulas)


def moe_peft(t: Tensors, kind: str, weights: Callable[[Tensor], Tensor], scale: float) -> Tensor:
    """MoE-PEFT, each linear by itself: y + sum_e w_e(x) scale B_e A_e x, w of the softmax of the linear's own router;
    where there is no router, y + scale B A x.
    """
    formulas: dict[str, Formula] = {}
    for i in range(2):
        for n in LINEARS:

            def formula(x: Tensor, y: Tensor, key: str = f"{kind}.layers.{i}.{n}") -> Tensor:
                if f"{key}.moe_gate.weight" not in t:
                    return y + scale * delta(t, key, x)
                w = weights(torch.softmax(x @ t[f"{key}.moe_gate.weight"].t(), -1))
                for e in range(w.shape[-1]):
                    y = y + w[..., e : e + 1] * scale * delta(t, f"{key}.experts.{e}", x)
                return y

            formulas[f"model.layers.{i}.{n}"] = formula
    return logits(formulas)


def meteora(t: Tensors, top_k: int, temperature: float, scales: list[float]) -> Tensor:
    """arXiv 2405.13053 sec. 3 as released: softmax of the top-k logits over T; expert e owns ranks e r to (e + 1) r."""
    E = len(scales)

    def formula(x: Tensor, y: Tensor, key: str) -> Tensor:
        A, B = t[f"{key}.lora_A.weight"].view(E, -1, x.shape[-1]), t[f"{key}.lora_B.weight"].view(y.shape[-1], E, -1)
        z = x @ t[f"{key}.moe_gate.weight"].t()
        chosen = z.topk(top_k).indices
        w = torch.zeros_like(z).scatter(-1, chosen, torch.softmax(z.gather(-1, chosen) / temperature, -1))
        return y + sum(w[..., e : e + 1] * scales[e] * (x @ A[e].t() @ B[:, e].t()) for e in range(E))

    paths = [f"model.layers.{i}.{n}" for i in range(2) for n in LINEARS]
    return logits({p: lambda x, y, k=f"base_model.model.{p}": formula(x, y, k) for p in paths})
