"""What the tests of edited routing share: running a model under one edit, and mixtures of equal experts."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from molora import context
from molora.eval.ablation.edits import GATES, Edit, Scene
from molora.layers.linear import MixtureLinear
from molora.routing import Routing
from tests.support import behaviours, tiny
from tests.support.traits import having, traits

# Recipes with a choice, and variants whose routing has another form.
MIXTURES = having(lambda t: t.routes)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{r: (r, {}) for r in MIXTURES},
    "top_p": ("mixlora", {"routing": "top_p", "top_p": 0.6}),
    "capacity": ("mixlora", {"routing": "switch", "expert_capacity": 3}),
    "shared_logits": ("smora", {"rank_partition": 2}),
    "hard": ("llava_mole", {"hard_weight": "one"}),
    "one_gate_for_all": ("xlora", {"layerwise_scalings": False}),
    "unbounded": ("xlora", {"enable_softmax": False}),
    "kept": ("xlora", {"top_k_lora": 2}),
}


def without(r: Routing, scene: Scene, *, expert: int) -> Routing:
    """An edit that empties slots: the expert's weight set to 0 and the others' left alone."""
    gone_TK = (r.slot_ids() == expert) & scene.valid_T.unsqueeze(1)
    ids_TK = None if r.ids is None else r.ids.masked_fill(gone_TK, -1)
    return r.decided(r.weights.masked_fill(gone_TK, 0.0), ids_TK)


def everywhere(edit: Edit, model: Any, batch: int = 0) -> contextlib.AbstractContextManager[None]:
    """Within the block, ``edit`` at every router; a frozen gate has 1, 2, 3, ... over their sum."""

    def editor(site: str, routing: Routing, valid_BS: Tensor) -> Routing:
        rising_E = torch.arange(1.0, routing.num_experts + 1)
        return edit(routing, Scene(valid_BS.reshape(-1), rising_E / rising_E.sum(), str(batch), site))

    return context.editing(model._molora.owner, editor)


def under(edit: Edit, model: Any, inputs: dict[str, Tensor], batch: int = 0) -> Tensor:
    """The model's output with ``edit`` at every router."""
    with everywhere(edit, model, batch):
        return tiny.output(model, inputs)


def equal_experts(recipe: str, name: str, folder: Path, **more: Any) -> Any:
    """An armed mixture in which all experts of a router are copies of one."""
    if traits(recipe).imported:
        same = {n: str(tiny.write_adapter(folder / n, name, r=4, seed=3)) for n in "abc"}
        return tiny.converted(recipe, name, folder, adapters=same, **more).eval()
    model = behaviours.armed(recipe, name, **more)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MixtureLinear) and m.bank is not None:
                A_rI, B_Or, _ = m.bank.expert(0)
                for e in range(1, m.site.num_experts):
                    m.bank.set_expert(e, A_rI.clone(), B_Or.clone())
    return model


assert list(GATES) == ["uniform", "shuffled", "random", "top-1", "frozen"]
