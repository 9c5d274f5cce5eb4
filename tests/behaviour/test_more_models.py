"""Models whose feed-forward block is shaped otherwise, and what the block costs: each projection sees a token once."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import molora
from tests.support import behaviours, tiny
from tests.support.tolerances import close

# (blocks, up-side linears a block) of each. CLIP has two towers side by side, and neither serves the other.
BLOCKS = {"mistral": (2, 2), "gemma3": (2, 2), "opt": (2, 1), "t5_gated": (4, 2), "whisper": (4, 1), "clip": (4, 1)}


@pytest.mark.parametrize("name", tiny.MORE)
def test_mixlora_on_other_shapes(name: str) -> None:
    model, inputs = tiny.base_model(name), tiny.batch(name)
    before, expected = behaviours.snapshot(model), tiny.output(model, inputs)
    molora.convert(model, "mixlora", **behaviours.options("mixlora", name))
    close(tiny.output(model, inputs), expected, "identity_ffn_fp32")
    roles = [s.role for s in model._molora.sites]
    blocks, ups = BLOCKS[name]
    assert (roles.count("down"), roles.count("up"), roles.count("rows")) == (blocks, blocks * ups, 0)
    tiny.arm(model)
    assert (tiny.output(model, inputs) - expected).abs().max() > 0.05 * expected.abs().max()
    loss, grads = behaviours.train_step(model, inputs)
    assert torch.isfinite(loss)
    assert all(bool(torch.isfinite(g).all()) for g in grads.values())
    assert all(bool(g.any()) for n, g in grads.items() if n.endswith(("lora_A", "lora_B", "weight")))
    model.eval().unload()
    assert behaviours.snapshot(model) == before
    assert torch.equal(tiny.output(model, inputs), expected)


def test_all_other_shapes_are_here() -> None:
    assert set(BLOCKS) == set(tiny.MORE)


@pytest.mark.parametrize("name", [*tiny.BUILDERS, *tiny.MORE])
@pytest.mark.parametrize("top_k", [1, 4])
def test_frozen_projections_see_every_token_once(name: str, top_k: int) -> None:
    """Floating-point operations of each frozen linear, counted: those of the bare model, whatever K is."""
    base, inputs = tiny.base_model(name), tiny.batch(name)
    balance = {"router_aux_loss_coef": 1e-2}
    model = molora.convert(tiny.base_model(name), "mixlora", r=4, num_experts=4, top_k=top_k, **balance)
    wanted, got = (FlopCounterMode(display=False, depth=None) for _ in range(2))
    with wanted:
        tiny.output(base, inputs)
    with got:
        tiny.output(model, inputs)
    cls = type(base).__name__
    for site in model._molora.sites:
        theirs, ours = (
            wanted.get_flop_counts()[f"{cls}.{site.path}"],
            got.get_flop_counts()[f"{cls}.{site.path}.base_layer"],
        )
        assert sum(ours.values()) == sum(theirs.values()) > 0, site.path
