"""What the behaviour tests share: the matrix of recipes and models, armed mixtures, and a model's whole state."""

from __future__ import annotations

import copy
import functools
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from molora.config import MoloraConfig
from molora.layers.banks.plain import ExpertBank
from molora.layers.routed import RoutedModule
from molora.routers import HiddenRouter, LinearRouter
from tests.support import tiny
from tests.support.traits import traits

PAIRS = [(r, n) for r in tiny.RECIPES for n in tiny.BUILDERS if (r, n) not in tiny.REFUSED]
CAUSAL_PAIRS = [(r, n) for r, n in PAIRS if n in tiny.CAUSAL]


def over(pairs: list[tuple[str, str]]) -> Any:
    """Parametrize a test over (recipe, name), with readable ids."""
    return pytest.mark.parametrize(("recipe", "name"), [pytest.param(r, n, id=f"{r}-{n}") for r, n in pairs])


matrix = over(PAIRS)
causal_matrix = over(CAUSAL_PAIRS)
each_recipe = over([(r, "llama") for r in tiny.RECIPES])


@functools.cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="molora-tests-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[Any] = []  # removed when the process ends


@functools.cache
def _armed(recipe: str, name: str, **more: Any) -> Any:
    model = tiny.converted(recipe, name, _root(), **more).eval()
    inputs = tiny.batch(name)
    ours, base = tiny.output(model, inputs), tiny.output(tiny.base_model(name), inputs)
    far = (ours - base).abs().max() > 0.05 * base.abs().max()
    assert far, f"{recipe} on {name} is not armed: it computes what the base does"
    return model


def armed(recipe: str, name: str, **more: Any) -> Any:
    """A mixture of the test's own that certainly differs from its base, in eval mode."""
    return copy.deepcopy(_armed(recipe, name, **more))


def shared(recipe: str, name: str) -> Any:
    """The same, one object for all tests of a process: only for tests that leave it as it is."""
    return _armed(recipe, name)


@functools.cache
def shared_fresh(recipe: str, name: str) -> Any:
    """Just converted; for tests that leave it as it is."""
    return tiny.converted(recipe, name, _root(), armed=False).eval()


def fresh(recipe: str, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Just converted, on a base of ``dtype``; ready-made experts get B = 0, as experts that start from nothing have."""
    model = copy.deepcopy(shared_fresh(recipe, name))
    own = [m for m in model.modules() if isinstance(m, ExpertBank | LinearRouter | HiddenRouter)]
    ours = {id(t) for m in own for t in (*m.parameters(), *m.buffers())}
    with torch.no_grad():
        for path, t in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith("lora_B"):
                t.zero_()
            elif id(t) not in ours and t.is_floating_point():
                t.data = t.data.to(dtype)
    return model


def options(recipe: str, name: str, **more: Any) -> dict[str, Any]:
    """Options of the small version of ``recipe`` on ``name``, with the ready-made adapters it needs."""
    return tiny.options(recipe, name, _root(), **more)


def config(recipe: str, name: str, **more: Any) -> MoloraConfig:
    """The config of the small version of ``recipe`` on ``name``, with the ready-made adapters it needs."""
    return tiny.config(recipe, name, _root(), **more)


def digest(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bits."""
    out = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].detach().contiguous()
        out.update(f"{key} {t.dtype} {tuple(t.shape)} ".encode())
        out.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that a conversion could change, by identity where objects must stay the same."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "class": type(model),
        "modules": {path: (id(m), type(m), m.training) for path, m in modules.items()},
        "order": list(modules),
        "attributes": {path: sorted(vars(m)) for path, m in modules.items()},
        "parameters": {n: (id(p), p.requires_grad) for n, p in model.named_parameters(remove_duplicate=False)},
        "buffers": {n: id(b) for n, b in model.named_buffers(remove_duplicate=False)},
        "hooks": {p: [len(getattr(m, h)) for h in hooks] for p, m in modules.items()},
        "checkpointing": {p: id(f) for p, m in modules.items() if (f := vars(m).get("_gradient_checkpointing_func"))},
        "bits": digest(model.state_dict()),
    }


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of the trainable parameters by name; a missing one is an error."""
    out = {}
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"{n} has no gradient"
            out[n] = p.grad.clone()
    return out


def loss_of(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    """The loss of a training forward, with task ids for a mixture that learns from them."""
    rows = next(iter(inputs.values())).shape[0]
    task_ids = torch.arange(rows) % 3 if traits(model).needs_tasks else None
    if "pixel_values" in inputs and "input_ids" in inputs:
        more = {"return_loss": True, **more}  # two towers, a contrastive loss without labels
    return model(**inputs, task_ids=task_ids, **more).loss


def train_step(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, gradients) of one forward and backward in train mode, from clean gradients."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = loss_of(model, inputs, **more)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Equal names and equal bits."""
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different, f"not bit-equal: {different}"


def sites(model: nn.Module) -> Iterator[tuple[str, RoutedModule]]:
    """Adapted modules by path."""
    return ((n, m) for n, m in model.named_modules() if isinstance(m, RoutedModule))


def force_experts(model: nn.Module, experts: list[int]) -> list[Any]:
    """Hooks that make every router prefer ``experts``; the handles, to take them off again.

    Of a bias that steers the choice, these experts get the largest values.
    """

    def prefer(module: nn.Module, args: Any, logits: Tensor) -> Tensor:
        push = torch.full(logits.shape[-1:], -50.0)
        push[experts] = 50.0
        return logits + push

    routers = [m for n, m in model.named_modules() if n.endswith("router") and not isinstance(m, RoutedModule)]
    assert routers
    for bias_E in (r.select_bias for r in routers if getattr(r, "select_bias", None) is not None):
        others = [e for e in range(len(bias_E)) if e not in experts]
        bias_E[[*experts, *others]] = bias_E.sort(descending=True).values
    return [r.register_forward_hook(prefer) for r in routers]
