"""What a PEFT adapter computes on a base, and what it changes there: on a copy, with PEFT's own code."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from molora.adapter.atomic_save import WEIGHTS
from molora.errors import AdapterError, MoloraError
from molora.extras import FAULTS, need
from molora.layers.linear import HALF
from molora.seeds import generator

__all__ = ["Probe", "changes", "linear_weight", "load_adapter", "model_output", "probes", "told", "wide_copy"]

ROWS = 64  # input vectors that a module's outputs are compared on

Probe = tuple[Tensor, Tensor]  # x (N, I) and the adapter's own outputs (N, O)


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as (O, I), a view; transformers' Conv1D holds it transposed."""
    weight = module.weight.detach()  # type: ignore[operator]
    return weight.T if isinstance(module, Conv1D) else weight


def wide_copy(base: nn.Module) -> nn.Module:
    """A frozen copy in eval mode, half precision as float32: a small change is lost when added to a bfloat16 weight."""
    model = copy.deepcopy(base).eval().requires_grad_(False)
    for t in (*model.parameters(), *model.buffers()):
        if t.dtype in HALF:
            t.data = t.data.float()
    return model


@torch.no_grad()
def model_output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """The logits, or the first output where a model has none."""
    out = model(**inputs)
    logits = getattr(out, "logits", None)
    return (out[0] if logits is None else logits).float()  # type: ignore[no-any-return]


@contextlib.contextmanager
def told(folder: Path, what: str) -> Iterator[None]:
    """Errors of PEFT and of the model's own code, as an AdapterError that names the folder and ``what`` failed."""
    try:
        yield
    except MoloraError:
        raise
    except FAULTS as e:
        raise AdapterError(f"{folder}: {what} ({type(e).__name__}: {str(e)[:300]})") from e


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """PEFT's model around ``model``, in which it replaces layers.

    Raises:
        AdapterError: when PEFT cannot load the folder on it, or loads it in part.
    """
    peft = need("peft", "peft", "to_lora")
    with told(folder, f"PEFT cannot put it on this {type(model).__name__}"):
        config = peft.PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise AdapterError(
                f"{folder}: got peft_type {config.peft_type.value!r}, which trains tokens in front of the text or of a "
                "layer and no linear's weight; expected a method that merges"
            )
        with torch.random.fork_rng(devices=[]):  # PEFT draws starts that the file then replaces
            adapted = peft.PeftModel.from_pretrained(model, folder)
        expected = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = set(file.keys())
    missing, extra = sorted(expected - found)[:2], sorted(found - expected - adapted.state_dict().keys())[:2]
    if missing or extra:
        raise AdapterError(
            f"{folder}: got tensors that do not fit this {type(model).__name__}: missing {missing}, too many {extra}; "
            "expected an adapter of this base model"
        )
    return adapted.eval()


@torch.no_grad()
def probes(base: nn.Module, model: nn.Module, inputs: Mapping[str, Any] | None, seed: int) -> dict[str, Probe]:
    """Each replaced linear's inputs, standard normal or what ``inputs`` sends there, and its own outputs."""
    replaced = [
        p
        for p, m in base.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and type(model.get_submodule(p)) is not type(m)
    ]
    seen: dict[str, Tensor] = {}
    if inputs is not None:
        seen = _inputs_of(model, replaced, inputs)
    out = {}
    for path in replaced:
        weight = linear_weight(base.get_submodule(path))
        x_NI = seen.get(path)
        if x_NI is None:
            x_NI = torch.randn(ROWS, weight.shape[1], generator=generator(seed, path)).to(weight.device)
        out[path] = x_NI, model.get_submodule(path)(x_NI.unsqueeze(0)).squeeze(0)
    return out


def _inputs_of(model: nn.Module, paths: list[str], inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keep(path: str, x: Tensor) -> None:
        rows = x.reshape(-1, x.shape[-1])
        seen.setdefault(path, rows[:: max(1, len(rows) // ROWS)][:ROWS].clone())

    hooks = [
        model.get_submodule(p).register_forward_pre_hook(lambda _, args, path=p: keep(path, args[0])) for p in paths
    ]
    try:
        model_output(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def changes(base: nn.Module, merged: nn.Module, folder: Path) -> dict[str, Tensor]:
    """D = W' - W as (O, I) by path, for every linear that the adapter changed.

    Raises:
        AdapterError: when it changed anything else, or nothing.
    """
    before, after = base.state_dict(), merged.state_dict()
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise AdapterError(f"{folder}: got other modules after merging ({odd[0]}); expected changes of weights only")
    first = {m: p for p, m in base.named_modules()}
    out: dict[str, Tensor] = {}
    for name, old in before.items():
        new = after[name]
        if new.shape == old.shape and torch.equal(new, old.to(new.dtype)):
            continue
        path, _, leaf = name.rpartition(".")
        if leaf != "weight" or not isinstance(base.get_submodule(path), nn.Linear | Conv1D):
            raise AdapterError(
                f"{folder}: it changes {name}, which is no weight of a linear; an expert is a change of linears' "
                "weights (train biases, norms and embeddings with molora's own modules_to_save)"
            )
        if first[base.get_submodule(path)] != path:
            continue  # a shared linear, under its second path
        D_OI = linear_weight(merged.get_submodule(path)) - linear_weight(base.get_submodule(path)).to(new.dtype)
        if not bool(D_OI.isfinite().all()):
            raise AdapterError(f"{folder}: {path} has NaN or infinite values after merging, expected finite weights")
        out[path] = D_OI
    if not out:
        raise AdapterError(f"{folder}: it changes no weight of this model, so there is nothing to convert")
    return out
