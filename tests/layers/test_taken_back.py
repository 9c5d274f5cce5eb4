"""Starts at a part of the weight: each expert takes its own back under its own gate, and the base keeps its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError
from molora.load import restore
from molora.seeds import generator
from molora.training.plan.counts import kinds_of
from tests.initialisers.test_initialisers import TARGETS, banks, peft, peft_lora
from tests.support import tiny
from tests.support.quantised import quantise
from tests.support.tolerances import close

RECIPES = {"lora": 4, "mixlora": 2, "mola": 2, "smora": 8, "llava_mole": 2}  # r; the narrowest weight has rank 16
STARTS = ("pissa", "pissa_niter_4", "olora")
ROUNDING = 1e-6  # of B A - B0 A0 in float32, relative to the base's outputs
HALF_ROUNDING = {torch.bfloat16: 8e-3, torch.float16: 1e-3}  # one rounding of an output in that dtype
A_FEW_STEPS = 1e-4  # PEFT's base is W - s B0 A0, rounded, so that float32 gradients differ by 1e-6 of themselves


def started(recipe: str, start: str = "pissa", name: str = "llama", **more: Any) -> Any:
    """A mixture with random gates, in eval mode; A and B are where they start."""
    options = {**tiny.SMALL[recipe], "r": RECIPES[recipe], "init_lora_weights": start, **more}
    return tiny.arm(molora.convert(tiny.base_model(name), recipe, **options)).eval()


def moved(model: Any) -> Any:
    """The same with A and B away from their start, as after training; the frozen ranks stay."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for bank in banks(model).values():
            for p in (bank.lora_A, bank.lora_B):
                p += 0.1 * torch.randn(p.shape, generator=g)
    return model


def frozen(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".frozen_" in n}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).double().norm() / b.double().norm())


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_at_the_start_the_model_is_the_base_whatever_the_gates_are(recipe: str, start: str) -> None:
    base = tiny.base_model("llama")
    before, expected = {k: v.clone() for k, v in base.state_dict().items()}, tiny.output(base, tiny.batch("llama"))
    model = started(recipe, start)
    assert distance(tiny.output(model, tiny.batch("llama")), expected) < ROUNDING
    for bank in banks(model).values():
        parts = [tuple(bank.views(e).values()) for e in range(len(bank.ranks))]
        assert len({tuple(A.flatten().tolist()) for A, *_ in parts}) == len(parts)
        assert all(torch.equal(A, A0) and torch.equal(B, -B0) and B.any() for A, B, A0, B0 in parts)
    plain = model.unload()
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())
    assert plain.state_dict().keys() == before.keys()


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
def test_transposed_weights_repeated_blocks_and_two_stacks(name: str) -> None:
    expected = tiny.output(tiny.base_model(name), tiny.batch(name))
    for start in ("pissa", "olora"):
        model = started("mixlora", start, name)
        assert all(bank.lora_B.any() for bank in banks(model).values())
        assert distance(tiny.output(model, tiny.batch(name)), expected) < ROUNDING


@pytest.mark.parametrize("dtype", HALF_ROUNDING)
def test_in_half_precision_the_two_roundings_are_the_same_and_cancel(dtype: torch.dtype) -> None:
    base = tiny.base_model("llama").to(dtype)
    expected = tiny.output(base, tiny.batch("llama"))
    model = tiny.arm(molora.convert(base, "mola", r=2, init_lora_weights="pissa")).eval()
    assert distance(tiny.output(model, tiny.batch("llama")), expected) < HALF_ROUNDING[dtype]


@pytest.mark.parametrize("recipe", ["lora", "mola", "smora", "llava_mole"])
def test_outputs_and_gradients_are_the_formulas(recipe: str) -> None:
    """float64: y = W x + sum_e w_e s (B_e A_e - B0_e A0_e) x, with the weights of the layer's own router."""
    model = moved(started(recipe).double())
    for path in ("model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"):  # with routers of their own
        m: Any = model.get_submodule(path)
        x = torch.randn(5, m.in_features, dtype=torch.float64)
        weights = torch.ones(5, 1) if m.always_on else m.route(x).dense().double()
        y = x @ m.base_layer.weight.T
        for e, s in enumerate(m.bank.scales):
            A, B, A0, minus_B0 = m.bank.views(e).values()
            y = y + weights[:, e : e + 1] * s * (x @ (B @ A + minus_B0 @ A0).T)
        got, probe = m(x), torch.randn_like(y)
        close(got, y, "formula")
        trained = [m.bank.lora_A, m.bank.lora_B]
        for a, b in zip(*(torch.autograd.grad((probe * t).sum(), trained) for t in (got, y)), strict=True):
            close(a, b, "formula")


@pytest.mark.parametrize("kernel", ["torch", "loop"])
@pytest.mark.parametrize("recipe", ["mixlora", "llava_mole", "mola"])
def test_it_is_the_plain_mixture_with_experts_of_twice_the_rank(recipe: str, kernel: str) -> None:
    """In blocks, too; the trained half has that mixture's gradients, the frozen half none."""
    alpha = tiny.SMALL[recipe].get("lora_alpha", 16)
    model = moved(started(recipe, kernel=kernel)).train()
    options = {**tiny.SMALL[recipe], "r": 4, "lora_alpha": 2 * alpha, "kernel": kernel}
    plain = molora.convert(tiny.base_model("llama"), recipe, **options).train()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if ".router." in n}, strict=False)
    for path, bank in banks(plain).items():
        for e in range(len(bank.ranks)):
            bank.set_expert(e, *banks(model)[path].expert(e)[:2])
    for m in (model, plain):
        m(**tiny.batch("llama")).loss.backward()
    assert torch.equal(tiny.output(model.eval(), tiny.batch("llama")), tiny.output(plain.eval(), tiny.batch("llama")))
    for path, bank in banks(model).items():
        twice = banks(plain)[path]
        for e, r in enumerate(bank.ranks):
            own, both = bank.span(e), twice.span(e).start
            close(bank.lora_A.grad[own], twice.lora_A.grad[both : both + r], "same_math_fp32")
            close(bank.lora_B.grad[:, own], twice.lora_B.grad[:, both : both + r], "same_math_fp32")
        assert bank.frozen_A.grad is None
        assert bank.frozen_B.grad is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_one_expert_starts_and_learns_as_in_peft(start: str, optimizer: Any) -> None:
    theirs = peft_lora(r=4, lora_alpha=8, init_lora_weights=start)
    ours = started("lora", start, lora_alpha=8, target_modules=TARGETS)
    for path, bank in banks(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        assert torch.equal(bank.lora_A, layer.lora_A["default"].weight)
        assert torch.equal(bank.lora_B, layer.lora_B["default"].weight)
    losses: dict[str, list[float]] = {}
    for which, model in (("ours", ours), ("theirs", theirs)):
        steps = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses[which] = []
        for _ in range(5):
            loss = model.train()(**tiny.batch("llama")).loss
            loss.backward()
            steps.step()
            steps.zero_grad()
            losses[which].append(loss.item())
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=A_FEW_STEPS)
    assert losses["ours"][-1] < losses["ours"][0] - 0.01
    outputs = [tiny.output(m.eval(), tiny.batch("llama")) for m in (ours, theirs)]
    assert distance(*outputs) < A_FEW_STEPS


def test_pissa_by_steps_and_on_transposed_weights_is_pefts() -> None:
    theirs = peft_lora("gpt2", ["c_fc"], r=4, init_lora_weights="pissa", fan_in_fan_out=True)
    for path, bank in banks(started("lora", "pissa", "gpt2", target_modules=["c_fc"], lora_alpha=8)).items():
        layer = theirs.base_model.model.get_submodule(path)
        close(2 * bank.lora_B @ bank.lora_A, layer.get_delta_weight("default").T, "same_math_fp32")
    for path, bank in banks(started("lora", "pissa_niter_4", lora_alpha=8)).items():
        torch.manual_seed(generator(0, path).initial_seed())
        config = peft.LoraConfig(init_lora_weights="pissa_niter_4")
        linear = tiny.base_model("llama").get_submodule(path)
        torch.manual_seed(generator(0, path).initial_seed())
        layer = peft.tuners.lora.Linear(linear, "default", config, r=4, lora_alpha=8)
        assert torch.equal(bank.lora_A, layer.lora_A["default"].weight)
        assert torch.equal(bank.lora_B, layer.lora_B["default"].weight)


def test_experts_share_out_the_principal_part() -> None:
    """All in all, and scaled, it is the weight's best approximation of R ranks."""
    model, base = started("mola", num_experts=3), tiny.base_model("llama")
    for path, bank in banks(model).items():
        U, S, Vh = torch.linalg.svd(base.get_submodule(path).weight.detach(), full_matrices=False)
        close(bank.scales[0] * bank.lora_B @ bank.lora_A, U[:, :6] @ torch.diag(S[:6]) @ Vh[:6], "same_math_fp32")
        for e in range(3):
            A, B, *_ = bank.views(e).values()
            own = [e, e + 3]
            close(bank.scales[0] * B @ A, U[:, own] @ torch.diag(S[own]) @ Vh[own], "same_math_fp32")


@pytest.mark.parametrize("recipe", ["mixlora", "smora"])
def test_training_with_weight_decay_leaves_the_frozen_ranks(recipe: str, tmp_path: Path) -> None:
    """A trained mixture goes through a folder bit by bit, and restore() puts it into a fresh one."""
    model = started(recipe).train()
    before, experts = frozen(model), {n: p.clone() for n, p in model.named_parameters() if "lora_" in n}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.5)
    for _ in range(3):
        model(**tiny.batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before
    assert all(torch.equal(t, before[n]) for n, t in frozen(model).items())
    assert not any(torch.equal(p, experts[n]) for n, p in model.named_parameters() if n in experts)
    expected = tiny.output(model.eval(), tiny.batch("llama"))
    model.save_pretrained(tmp_path)
    again = molora.load(tiny.base_model("llama"), tmp_path, trainable=True).eval()
    fresh = started(recipe)
    restore(fresh, tmp_path)
    for other in (again, fresh):
        assert torch.equal(tiny.output(other, tiny.batch("llama")), expected)
        assert all(torch.equal(t, before[n]) for n, t in frozen(other).items())
        flags = {n: p.requires_grad for n, p in other.named_parameters()}
        assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    trainable, total = again.get_nb_trainable_parameters()
    kinds = {k.name: k for k in kinds_of(again)}
    assert kinds["frozen ranks"].parameters == kinds["A"].parameters + kinds["B"].parameters
    assert kinds["frozen ranks"].trained == 0
    assert (trainable, total) == (sum(k.trained for k in kinds.values()), sum(k.parameters for k in kinds.values()))
    assert "frozen ranks | " in (tmp_path / "README.md").read_text()


def test_a_quantised_weight_is_read_where_peft_can_unpack_it_and_stays_packed() -> None:
    base = quantise(lambda: tiny.base_model("llama"), "torchao_int8")
    expected, packed = tiny.output(base, tiny.batch("llama")), base.model.layers[0].mlp.up_proj.weight
    model = tiny.arm(molora.convert(base, "mola", r=2, init_lora_weights="pissa")).eval()
    assert distance(tiny.output(model, tiny.batch("llama")), expected) < ROUNDING
    assert model.unload().model.layers[0].mlp.up_proj.weight is packed
    unreadable = tiny.base_model("llama")
    unreadable.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32, dtype=torch.int8), False)
    with pytest.raises(ConfigError, match=r"'olora': .*up_proj is a Linear whose weight cannot be read"):
        molora.convert(unreadable, "lora", r=2, init_lora_weights="olora")
