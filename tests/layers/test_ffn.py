"""The ffn unit computes ``sum_k w_k FFN_k(x)`` on every kind of block, at the price of one block call a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import molora
from molora.errors import ConfigError
from molora.layers.ffn import FFNDown, FFNRows, FFNUp
from molora.layers.linear import MixtureLinear
from molora.routing import Routing
from tests.support.tiny import arm, batch, converted
from tests.support.tolerances import close
from tests.surgery.test_ffn_found import EXPECTED, Toy

R, ALPHA, E = 4, 8.0, 4


def blocks(model: Any) -> list[dict[str, Any]]:
    """Sites of each block by path, in module order."""
    out: dict[str, dict[str, Any]] = {}
    for path, m in model.named_modules():
        if isinstance(m, MixtureLinear) and m.site.block:
            out.setdefault(m.site.block, {})[path] = m
    return list(out.values())


def by_hand(sites: list[Any], act: Any, x: Tensor, routing: Routing) -> Tensor:
    """sum_k w_k FFN_k(x): every chosen expert runs the whole block, its bias included. Last site: down."""
    *ups, down = sites

    def linear(m: Any, z: Tensor, e: int) -> Tensor:
        if m.bank is None:
            return m.base_layer(z)
        A, B, s = m.bank.expert(e)
        return m.base_layer(z) + s * (z @ A.t() @ B.t())

    assert routing.ids is not None
    rows = []
    for t, weights, ids in zip(x, routing.weights, routing.ids, strict=True):
        y = torch.zeros(down.out_features)
        for w, e in zip(weights, ids.tolist(), strict=True):
            if e >= 0:
                y = y + w * linear(down, act(*(linear(u, t, e) for u in ups)), e)
        rows.append(y)
    return torch.stack(rows)


def silu_gated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.nn.functional.silu(gate) * up


def silu_halves(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def gelu_tanh(h: Tensor) -> Tensor:
    return torch.nn.functional.gelu(h, approximate="tanh")


KINDS = {  # a gated block, a fused one, one with biases and Conv1D
    "llama": ("model.layers.1.mlp", silu_gated),
    "phi3": ("model.layers.1.mlp", silu_halves),
    "gpt2": ("transformer.h.1.mlp", gelu_tanh),
}
ROUTES: dict[str, dict[str, Any]] = {
    "k1": {"top_k": 1},
    "k2": {"top_k": 2},
    "k_is_e": {"top_k": E},
    "top_p": {"routing": "top_p", "top_p": 0.6},
    "switch": {"routing": "switch", "expert_capacity": 3},
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", KINDS)
def test_block_is_the_sum_over_chosen_experts(name: str, route: str, root: Path):
    """Also where the weights do not sum to 1 and the down projection has a bias (which then counts that often)."""
    path, act = KINDS[name]
    model = converted("mixlora", name, root, r=R, lora_alpha=ALPHA, num_experts=E, **ROUTES[route])
    block = model.get_submodule(path)
    sites = [m for m in block.modules() if isinstance(m, MixtureLinear)]
    if name == "gpt2":
        with torch.no_grad():
            sites[-1].base_layer.bias.normal_(generator=torch.Generator().manual_seed(1))
        assert sites[-1].bias.abs().max() > 1
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4)).requires_grad_()
    got = block(x)
    routing = sites[0].route(x.flatten(0, 1))
    if route in ("top_p", "switch"):
        assert not torch.allclose(routing.weights.sum(-1), torch.ones(10))
    expected = by_hand(sites, act, x.flatten(0, 1), routing).view_as(x)
    close(got, expected, "same_math_fp32")
    with torch.no_grad():
        assert torch.equal(block(x), got)  # a gated unit is computed at once there, without a slot axis
    inputs = [x, *(p for p in block.parameters() if p.requires_grad)]
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(6))
    ours, theirs = (torch.autograd.grad(y, inputs, seed, allow_unused=True) for y in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        close(*(torch.zeros(1) if t is None else t for t in (a, b)), "same_math_fp32")


@pytest.mark.parametrize("targets", ["gate", "up", "down", "gate,up", "up,down"])
def test_partly_targeted_blocks(targets: str, root: Path):
    """Untargeted projections of the block run frozen; the router is there all the same."""
    names = [f"{t}_proj" for t in targets.split(",")]
    own = {"r": R, "lora_alpha": ALPHA, "num_experts": E, "target_modules": names}
    model = converted("mixlora", "llama", root, **own)
    mlp = model.model.layers[0].mlp
    sites = [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    with_bank = [n for n, m in zip(("gate_proj", "up_proj", "down_proj"), sites, strict=True) if m.bank is not None]
    assert with_bank == names
    assert sites[0].router is not None
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        routing = sites[0].route(x)
        close(mlp(x), by_hand(sites, silu_gated, x, routing), "same_math_fp32")
    model.train()(**batch("llama")).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", EXPECTED)
def test_converts_and_trains_on(name: str, root: Path):
    """Every tiny shape: the unit's sites are the expected linears, and one step moves experts and routers."""
    own = {"r": 2, "num_experts": 3, "target_modules": ".*"} if name == "clip" else {"r": 2, "num_experts": 3}
    model = converted("mixlora", name, root, **own).train()
    found = {tuple(sites): [type(m) for m in sites.values()] for sites in blocks(model)}
    for layer, (ups, down) in EXPECTED[name].items():
        for i in range(2):
            paths = (*ups, down)
            sites = next(t for p, t in found.items() if set(p) == {f"{layer.format(i)}.{n}" for n in paths})
            assert sites.count(FFNDown) == 1
            assert sites.count(FFNUp) == len(ups)
    out = model(**batch(name))
    loss = out.loss if out.loss is not None else out.logits_per_text.square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    for sites in blocks(model):
        lead = next(m for m in sites.values() if m.router is not None)
        assert lead.router.weight.grad.any()


def toy(middle: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Toy(middle).eval()


def test_rows_equal_slots():
    """The fallback, a whole module run once per chosen expert, computes what the slot axis computes."""
    slots, rows = (
        arm(molora.convert(toy(m), "mixlora", r=R, lora_alpha=ALPHA, num_experts=E)) for m in ("plain", "sized")
    )
    kinds = [{type(m) for m in model.modules()} & {FFNRows, FFNUp, FFNDown} for model in (slots, rows)]
    assert kinds == [{FFNUp, FFNDown}, {FFNRows}]
    pairs = []
    for a, b in zip(slots.layers, rows.layers, strict=True):
        pairs.append((a.ffn.up.router, b.ffn.router))
        pairs += [(getattr(a.ffn, n).bank, getattr(b.ffn.base_layer, n).bank) for n in ("up", "down")]
        pairs.append((a.attention.bank, b.attention.bank))
    for a, b in pairs:
        b.load_state_dict(a.state_dict())
    ids = torch.arange(10).view(2, 5)
    a, b = slots(ids), rows(ids)
    close(b, a, "same_math_fp32")
    for y in (a, b):
        y.square().sum().backward()
    for x, y in pairs:
        for p, q in zip(x.parameters(), y.parameters(), strict=True):
            assert p.grad.any()
            close(q.grad, p.grad, "same_math_fp32")
    with rows.disable_adapter(), torch.no_grad():
        assert torch.equal(rows(ids), toy("sized")(ids))
        assert (rows(ids) - a).abs().max() > 0.05
    rows.unload()
    assert not any(isinstance(m, FFNRows | MixtureLinear) for m in rows.modules())
    assert torch.equal(rows(ids), toy("sized")(ids))


def test_an_output_without_a_place_for_the_balance_loss():
    """A bare tensor is refused in training, with the remedy; a dict gets the keys."""
    model = molora.convert(toy("plain"), "mixlora", r=R, num_experts=E).train()
    with pytest.raises(ConfigError, match="got a Tensor as its output.*or set its coefficient to 0"):
        model(torch.arange(10).view(2, 5))

    class Named(Toy):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            y = super().forward(input_ids)
            return {"y": y, "loss": y.square().mean()}

    with torch.no_grad():
        model = molora.convert(Named("plain"), "mixlora", r=R, num_experts=E, router_aux_loss_coef=0.5).train()
        out = model(torch.arange(10).view(2, 5))
        assert out.keys() == {"y", "loss", "aux_loss"}
        close(out["loss"], out["y"].square().mean() + 0.5 * out["aux_loss"], "same_math_fp32")


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_frozen_projections_see_each_token_once(top_k: int, root: Path):
    """Exact FLOPs of one block: three frozen products of T rows whatever K is, and the ranks' products."""
    T, D, F = 10, 32, 48
    model = converted("mixlora", "llama", root, r=R, num_experts=E, top_k=top_k)
    mlp = model.model.layers[0].mlp
    seen: dict[str, int] = {}
    for name in ("gate_proj", "up_proj", "down_proj"):
        base = getattr(mlp, name).base_layer
        base.register_forward_pre_hook(
            lambda m, a, n=name: seen.update({n: seen.get(n, 0) + a[0].numel() // m.in_features})
        )
    x = torch.randn(2, 5, D)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mlp(x)
    assert seen == {"gate_proj": T, "up_proj": T, "down_proj": T}
    frozen, router, ranks = 3 * 2 * T * D * F, 2 * T * D * E, E * R
    up = 2 * T * D * ranks + 2 * T * top_k * ranks * F
    down = 2 * T * top_k * F * ranks + 2 * T * ranks * D
    mix = 2 * T * top_k * F
    assert counter.get_total_flops() == frozen + router + 2 * up + down + mix


def test_jitter_is_for_training_only(root: Path):
    """Eval does not see it; training does, at the router alone, and the input is left as it was."""
    noisy, calm = (converted("mixlora", "llama", root, r=R, jitter=j) for j in (0.5, 0.0))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(4))
    before = x.clone()
    blocks_of = [m.model.layers[0].mlp for m in (noisy, calm)]
    with torch.no_grad():
        assert torch.equal(blocks_of[0](x), blocks_of[1](x))
        for m in (noisy, calm):
            m.train()
        a, b = (torch.stack([block(x) for _ in range(2)]) for block in blocks_of)
    assert torch.equal(b[0], b[1])
    assert not torch.equal(a[0], a[1])
    assert torch.equal(x, before)


def test_a_block_of_its_own_call_order(root: Path):
    """The site that runs first owns the router, whatever order the modules were registered in."""
    model = converted("mixlora", "t5_gated", root, r=2, num_experts=3)
    for sites in blocks(model):
        leads = [p.rpartition(".")[2] for p, m in sites.items() if m.site.lead]
        assert leads == ["wi_0"]
