"""Which operator each site of each recipe runs, and that the model's output is that of plain PyTorch."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from molora.kernels import dispatch
from molora.layers.linear import MixtureLinear
from tests.kernels.interpreted.cases import DEVICE
from tests.support import tiny
from tests.support.tolerances import close


class Ops(TorchDispatchMode):
    """Counts this package's operators by the site that called them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.inside: list[str] = []
        for path, m in model.named_modules():
            if isinstance(m, MixtureLinear):
                m.register_forward_pre_hook(lambda *_, path=path: self.inside.append(path))
                m.register_forward_hook(lambda *_: self.inside.pop() and None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("molora::") and self.inside:  # not in a backward pass
            self.seen[self.inside[-1]][name.removeprefix("molora::")] += 1
        return func(*args, **(kwargs or {}))


def built(recipe: str, root: Path, kernel: str, **more: Any) -> Any:
    return tiny.converted(recipe, "llama", root, kernel=kernel, **more).to(DEVICE).eval()


@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_every_site_runs_the_operator_of_its_role(recipe: str, root: Path):
    model = built(recipe, root, "triton")
    inputs = {k: v.to(DEVICE) for k, v in tiny.batch("llama").items()}
    with Ops(model) as ops, torch.no_grad():
        logits = model(**inputs).logits
    sites = {p: m for p, m in model.named_modules() if isinstance(m, MixtureLinear)}
    wanted = {"up": {}, "down": {"mix_glu": 1}}  # the down linear of a gated unit runs what the up side left
    for path, site in sites.items():
        assert dict(ops.seen[path]) == wanted.get(site.site.role, {"rank_mix_linear": 1}), path
    with torch.no_grad():
        close(logits, built(recipe, root, "torch")(**inputs).logits, "same_math_fp32")


@pytest.mark.parametrize(
    "more", [{"lora_dropout": 0.5}, {"rank_pattern": {"down_proj": 3}}, {"r": 40}], ids=["dropout", "ranks", "wide"]
)
def test_blocks_that_are_no_whole_unit_keep_their_slots(more: dict[str, Any], root: Path):
    """Dropout on the slots, unequal ranks, or more ranks than one program of the unit's kernel holds."""
    model = built("mixlora", root, "triton", **more).train()
    with Ops(model) as ops:
        model(**{k: v.to(DEVICE) for k, v in tiny.batch("llama").items()}).loss.backward()
    roles = {p: m.site.role for p, m in model.named_modules() if isinstance(m, MixtureLinear)}
    wanted = {"up": {"expand_slots": 1}, "down": {"contract_slots": 1}}
    assert all(dict(ops.seen[p]) == wanted[role] for p, role in roles.items() if role in wanted)


def test_dropout_and_hooks_call_the_layer_itself(root: Path):
    """The base's product is left to the module where somebody looks at it, or where the experts see another input."""
    inputs = {k: v.to(DEVICE) for k, v in tiny.batch("llama").items()}
    model = built("mola", root, "triton", lora_dropout=0.5).train()
    with Ops(model) as ops:
        model(**inputs).loss.backward()
    assert {n for seen in ops.seen.values() for n in seen} == {"rank_mix"}
    model = built("mola", root, "triton")
    path, site = next((p, m) for p, m in model.named_modules() if isinstance(m, MixtureLinear))
    calls: list[int] = []
    site.base_layer.register_forward_hook(lambda *_: calls.append(1))
    with Ops(model) as ops, torch.no_grad():
        model(**inputs)
    assert calls == [1]
    assert dict(ops.seen.pop(path)) == {"rank_mix": 1}
    assert {n for seen in ops.seen.values() for n in seen} == {"rank_mix_linear"}


@pytest.mark.parametrize(("recipe", "kernel"), [("mola", "sorted"), ("smora", "sorted"), ("smora", "gather")])
def test_sorted_and_gathered_sites_mean_the_same(recipe: str, kernel: str, root: Path):
    model = built(recipe, root, kernel)
    inputs = {k: v.to(DEVICE) for k, v in tiny.batch("llama", rows=1, length=5).items()}
    with Ops(model) as ops, torch.no_grad():
        logits = model(**inputs).logits
    assert {n for seen in ops.seen.values() for n in seen} == {f"{kernel}_mix"}
    with torch.no_grad():
        close(logits, built(recipe, root, "torch")(**inputs).logits, "same_math_fp32")


@pytest.mark.parametrize("recipe", ["mixlora", "smora", "xlora"])  # the operators of blocks, of linears, and two passes
def test_one_graph_for_every_length(recipe: str, root: Path):
    """Full-graph compilation with unknown length: the operators do not break it."""
    model = built(recipe, root, "triton")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for length in (5, 9):
        inputs = {k: v.to(DEVICE) for k, v in tiny.batch("llama", rows=1, length=length, labels=False).items()}
        with torch.no_grad():
            close(compiled(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits, "same_math_fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_lowers_the_products(dtype: torch.dtype, root: Path):
    """float32 parameters get float32 gradients; the operators see the lower dtype."""
    a, b = (built("mola", root, k) for k in ("triton", "torch"))
    inputs = {k: v.to(DEVICE) for k, v in tiny.batch("llama").items()}
    losses = []
    for model in (a, b):
        with torch.autocast(DEVICE, dtype):
            losses.append(model(**inputs).loss)
        losses[-1].backward()
    assert abs(losses[0].item() - losses[1].item()) < 0.02 * losses[1].item()
    assert all(p.grad.dtype == torch.float32 for p in a.parameters() if p.requires_grad)


def test_interpreter_or_gpu_is_named_in_the_choice():
    call = dispatch.Call(64, DEVICE, torch.float32)
    assert dispatch.choose("triton", call).reason == "asked for by kernel="
    with pytest.raises(ValueError, match="float64"):
        dispatch.choose("triton", call._replace(dtype=torch.float64))
