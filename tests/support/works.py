"""One cell of the table of bases: everything that a recipe promises, on one base."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import molora
from tests.support import behaviours, tiny
from tests.support.families import FAMILIES, IMAGE, base, inputs
from tests.support.tolerances import close
from tests.support.traits import traits

# What one set of gates for the whole model needs to be asked for on a base, and the note that says so in the table.
ASKED = {"deepseek": ({"exclude_modules": ["kv_b_proj"]}, "latent")}
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [IMAGE]}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="molora-support-")


@functools.cache
def adapters(family: str) -> dict[str, str]:
    """Two ordinary PEFT LoRA folders for the base, of unequal rank."""
    out = {}
    for seed, r in ((1, 4), (2, 2)):
        model: Any = tiny.arm(molora.convert(base(family), "lora", r=r), seed)
        out[f"rank_{r}"] = str(Path(_folder().name) / family / f"rank_{r}")
        model.export_expert(0, out[f"rank_{r}"])
    return out


def options(recipe: str, family: str) -> dict[str, Any]:
    """Those of the small version of ``recipe``, with adapters for this base."""
    own = {"adapters": adapters(family)} if traits(recipe).imported else {}
    named = FAMILIES[family].parameters
    own |= {"target_parameters": list(named)} if named else {}
    return {**tiny.SMALL[recipe], **own, **asked(recipe, family)[0]}


def asked(recipe: str, family: str) -> tuple[dict[str, Any], str]:
    """Options beside the usual ones, and the key of the note."""
    return ASKED.get(family, ({}, "")) if traits(recipe).model_wide else ({}, "")


def works(recipe: str, family: str) -> str:
    """Convert, identity at B = 0, another output when armed, gradients, generation, off, save, load, unload.

    Returns the key of a note, or an empty string.
    """
    model, batch = base(family), inputs(family)
    expected, before = tiny.output(model, batch), _digest(model)
    molora.convert(model, recipe, **options(recipe, family))
    _is_the_base_at_zero(model, batch, expected)
    tiny.arm(model)
    ours = tiny.output(model, batch)
    assert (ours - expected).abs().max() > 0.01 * expected.abs().max(), "not armed: it computes what the base does"
    _every_adapter_parameter_learns(model, batch)
    if FAMILIES[family].cached and model.can_generate():
        prompt = {k: v for k, v in batch.items() if k != "labels"}
        cached, plain = (model.generate(**prompt, **GREEDY, use_cache=c) for c in (True, False))
        assert torch.equal(cached, plain)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model, batch), expected)
    folder = Path(_folder().name) / "saved" / family / recipe
    model.save_pretrained(folder)
    assert torch.equal(tiny.output(molora.load(base(family), folder), batch), ours)
    model.unload()
    assert torch.equal(tiny.output(model, batch), expected)
    assert _digest(model) == before
    return asked(recipe, family)[1] or FAMILIES[family].note


def _is_the_base_at_zero(model: nn.Module, batch: dict[str, Tensor], expected: Tensor) -> None:
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.data.zero_()
    if traits(model).mixes_blocks:
        if traits(model).is_base_at_zero:
            close(tiny.output(model, batch), expected, "identity_ffn_fp32")
    else:
        assert torch.equal(tiny.output(model, batch), expected)


def _every_adapter_parameter_learns(model: Any, batch: dict[str, Tensor]) -> None:
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    loss, gradients = behaviours.train_step(model, batch)
    model.eval()
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(g).all()) for g in gradients.values())
    assert not [n for n, g in gradients.items() if n.endswith(("lora_A", "lora_B")) and not g.any()]
    assert not [n for n, p in model.named_parameters() if n in frozen and p.grad is not None]


def _digest(model: nn.Module) -> str:
    """Of the plain tensors: those of a quantised subclass are not read, and a state dict would repack some."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return behaviours.digest({k: v for k, v in tensors if type(v) in (Tensor, nn.Parameter)})
