"""What must not change the result: the order of experts, tokens and rows; equal experts; choosing all (B4, B5, B7)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.config import Placement
from molora.kernels.reference import Layout, gates_of
from molora.layers.linear import MixtureLinear
from molora.layers.routed import RoutedModule
from molora.routers import FixedRouter, HiddenRouter, LinearRouter
from tests.support.tiny import (
    RECIPES,
    adapters,
    arm,
    base_model,
    batch,
    config,
    converted,
    options,
    output,
    write_adapter,
)
from tests.support.tolerances import close
from tests.support.traits import ADAPTERS, changed, having, traits

MIXTURES = having(lambda t: t.routes)
TINY = ("llama", "gpt2")


def backwards(experts: int) -> tuple[int, ...]:
    return tuple(reversed(range(experts)))


def permute(model: nn.Module) -> None:
    """Reverse the experts of every bank and the router rows with them."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MixtureLinear) and m.bank is not None:
                blocks = [m.bank.expert(e)[:2] for e in reversed(range(len(m.bank.ranks)))]
                A, B = torch.cat([a for a, _ in blocks]), torch.cat([b for _, b in blocks], 1)
                m.bank.lora_A.copy_(A)
                m.bank.lora_B.copy_(B)
                m.bank.ranks, m.bank.scales = m.bank.ranks[::-1], m.bank.scales[::-1]
                m.bank.expert_R.copy_(torch.tensor([e for e, r in enumerate(m.bank.ranks) for _ in range(r)]))
                m.bank.scale_R.copy_(m.bank.scale_R.flip(0))
                m.bank.slot_gate_ER.copy_(
                    gates_of(Layout(m.bank.ranks, m.bank.scales, m.bank.expert_R, m.bank.scale_R))
                )
            router = getattr(m, "router", None)
            if isinstance(router, nn.Module) and type(router) not in (LinearRouter, FixedRouter):
                m.router = router.resized(backwards(router.num_experts), m.placement.router, m.placement.gate, 0.0)
            elif isinstance(router, nn.Module):
                for t in (*router.parameters(), *(b for n, b in router.named_buffers() if n == "select_bias")):
                    t.copy_(t.flip(0))
            if isinstance(m, HiddenRouter):
                for t in m.layers[-1].parameters():
                    t.copy_(t.unflatten(0, (-1, m.num_experts)).flip(1).flatten(0, 1))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("recipe", MIXTURES)
def test_order_of_experts_does_not_matter(recipe: str, name: str, root: Path):
    model, inputs = converted(recipe, name, root), batch(name)
    before = output(model, inputs)
    state = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    permute(model)
    assert any(not torch.equal(p, state[n]) for n, p in model.named_parameters() if n in state)
    close(output(model, inputs), before, "same_math_fp32")


def make_equal(model: nn.Module) -> None:
    """Every expert of a bank becomes a copy of its first."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, MixtureLinear) and m.bank is not None and len(m.bank.ranks) > 1:
                A, B, _ = (t.clone() if isinstance(t, Tensor) else t for t in m.bank.expert(0))
                for e in range(len(m.bank.ranks)):
                    m.bank.set_expert(e, A, B)


def summing(p: Placement) -> Placement:
    """The placement with weights that sum to 1."""
    gate = p.gate.replace(capacity=None, top_p=None)
    if gate.top_k is None:
        gate = gate.replace(activation="softmax")
    elif gate.renormalize not in ("one", "softmax"):
        gate = gate.replace(hard_weight="ste") if gate.top_k == 1 else gate.replace(renormalize="one")
    return p.replace(gate=gate)


@pytest.mark.parametrize("recipe", having(lambda t: t.routes and not t.rank_one))
def test_equal_experts_are_one_lora(recipe: str, root: Path):
    """B5: the output does not depend on the router, and is that of plain LoRA with the expert's weights."""
    own = {}
    if traits(recipe).imported:
        same = {n: str(root / "equal" / n) for n in "abc"}
        for folder in same.values():
            write_adapter(Path(folder), "llama", r=4, seed=3)
        own["adapters"] = same
    whole = config(recipe, "llama", root, **own)
    model = arm(molora.convert(base_model("llama"), changed(whole, summing)))
    assert traits(model).sums_to_one
    assert model._molora.config == whole or not traits(recipe).sums_to_one
    make_equal(model)
    inputs = batch("llama")
    first, routers = output(model, inputs), [p for n, p in model.named_parameters() if "router" in n]
    before = [p.clone() for p in routers]
    arm(model, seed=9)
    assert not any(torch.equal(a, b) for a, b in zip(routers, before, strict=True))
    close(output(model, inputs), first, "same_math_fp32")
    sites = {s.path: model._molora.config.placements[s.placement] for s in model._molora.sites}
    ranks = {path: 4 if p.imported else p.r for path, p in sites.items()}
    plain = molora.convert(
        base_model("llama"),
        "lora",
        target_modules=list(sites),
        rank_pattern=ranks,
        alpha_pattern={path: p.lora_alpha for path, p in sites.items()},
        use_rslora=any(p.scale_by == "sqrt_r" for p in sites.values()),
    )
    with torch.no_grad():
        for name, m in plain.named_modules():
            if isinstance(m, MixtureLinear):
                source = model.get_submodule(name)
                m.bank.set_expert(0, *source.bank.expert(0)[:2])
                assert source.bank.scales[0] == m.bank.scales[0]
    close(output(plain, inputs), first, "same_math_fp32")


def test_smora_with_equal_scores_is_lora_of_the_same_scale(root: Path):
    """All ranks chosen at equal scores: each weight 1, so plain LoRA of rank R at alpha / R."""
    model = converted("smora", "llama", root, r=16, top_k=16, lora_alpha=16)
    plain = molora.convert(base_model("llama"), "lora", r=16, lora_alpha=16)
    with torch.no_grad():
        for name, m in model.named_modules():
            if isinstance(m, MixtureLinear):
                m.router.weight.zero_()
                target = plain.get_submodule(name).bank
                target.lora_A.copy_(m.bank.lora_A)
                target.lora_B.copy_(m.bank.lora_B)
    close(output(model, batch("llama")), output(plain, batch("llama")), "same_math_fp32")


@pytest.mark.parametrize("recipe", having(lambda t: t.is_dense_at_all))
def test_choosing_all_is_dense(recipe: str, root: Path):
    """B7: K = E is the router without selection; of probabilities, also the choice until they reach 1."""

    def choosing_all(p: Placement) -> Placement:
        experts = p.r if p.rank_one else len(ADAPTERS) if p.imported else p.num_experts
        most = max(experts) if isinstance(experts, tuple) else experts  # one number for all layers
        own = {} if p.imported else {"r" if p.rank_one else "num_experts": most}
        return p.replace(gate=p.gate.replace(top_k=most, top_p=None, capacity=None, hard_weight="prob"), **own)

    def until_all(p: Placement) -> Placement:
        return p.replace(gate=p.gate.replace(top_k=None, top_p=1.0, renormalize="none"))

    own = changed(config(recipe, "llama", root), choosing_all)
    every, dense = (arm(molora.convert(base_model("llama"), own)) for _ in range(2))
    for m in dense.modules():  # take the choice away
        if isinstance(m, RoutedModule):
            m.site = m.site.replace(top_k=None)
        if isinstance(m, HiddenRouter):
            m.gate_config = m.gate_config.replace(top_k=None)
    close(output(every, batch("llama")), output(dense, batch("llama")), "same_math_fp32")
    if all(p.gate.activation == "softmax" for p in traits(own).choosing) and not traits(own).steers:
        nucleus = arm(molora.convert(base_model("llama"), changed(own, until_all)))
        close(output(every, batch("llama")), output(nucleus, batch("llama")), "same_math_fp32")


@pytest.mark.parametrize("recipe", MIXTURES)
def test_order_of_rows_and_tokens(recipe: str, root: Path):
    """Rows swap with their results; on one linear, so do tokens."""
    model, inputs = converted(recipe, "llama", root), batch("llama", rows=3)
    order = torch.tensor([2, 0, 1])
    shuffled = {k: v[order] for k, v in inputs.items()}
    close(output(model, shuffled), output(model, inputs)[order], "same_math_fp32")
    if traits(recipe).model_wide or traits(recipe).couples_tokens:
        return  # the gates come from the whole model, or depend on the tokens before
    layer = model.get_submodule(f"model.layers.0.{'mlp' if traits(recipe).in_blocks else 'self_attn.q_proj'}")
    x = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(1))
    mixed = torch.randperm(7, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        close(layer(x[:, mixed]), layer(x)[:, mixed], "same_math_fp32")


@pytest.mark.parametrize("recipe", RECIPES)
def test_disabled_is_the_base(recipe: str, root: Path):
    model, inputs = converted(recipe, "llama", root), batch("llama")
    base = output(base_model("llama"), inputs)
    with model.disable_adapter():
        assert torch.equal(output(model, inputs), base)
    assert not torch.allclose(output(model, inputs), base, atol=1e-3)


@pytest.mark.parametrize("recipe", having(lambda t: t.starts_as_base))
def test_fresh_is_the_base(recipe: str, root: Path):
    """B = 0: bit for bit with linear units, to rounding where whole blocks are mixed."""
    model, inputs = converted(recipe, "llama", root, armed=False), batch("llama")
    got, base = output(model, inputs), output(base_model("llama"), inputs)
    if traits(recipe).mixes_blocks:
        close(got, base, "identity_ffn_fp32")
    else:
        assert torch.equal(got, base)


def test_imported_experts_without_weight_are_the_base(root: Path):
    """X-LoRA whose gates are all zero: the two passes leave the base as it is."""
    model = molora.convert(base_model("llama"), "xlora", **options("xlora", "llama", root, enable_softmax=False))
    with torch.no_grad():
        for p in model.molora_router.parameters():
            p.zero_()
    assert len(adapters(root, "llama")) == 3
    inputs = batch("llama")
    close(output(model, inputs), output(base_model("llama"), inputs), "same_math_fp32")
