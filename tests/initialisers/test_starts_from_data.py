"""LoRA-GA and CorDA: experts start where PEFT's code on the data says, take it back, and leave the base untouched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import ConfigError
from molora.initialisers.corda import init_corda
from molora.initialisers.eva import init_eva
from molora.initialisers.lora_ga import init_lora_ga
from molora.seeds import generator
from molora.surgery.install import sites_of
from tests.initialisers.test_initialisers import TARGETS, banks, batches, peft
from tests.layers.test_taken_back import ROUNDING, distance, moved
from tests.support import tiny
from tests.support.quantised import quantise
from tests.support.tolerances import close

ROWS = [{k: v[:1] for k, v in b.items()} for b in batches(6)]  # CorDA takes one row at a time, without padding
INITS: dict[str, Callable[[Any], None]] = {
    "lora_ga": lambda model: init_lora_ga(model, batches()),
    "corda ipm": lambda model: init_corda(model, ROWS),
    "corda kpm": lambda model: init_corda(model, ROWS, corda_method="kpm"),
}


def converted(recipe: str = "mola", base: Any = None, **options: Any) -> Any:
    model = tiny.base_model("llama") if base is None else base
    more = {"num_experts": 3} if recipe == "mola" else {}
    return molora.convert(model, recipe, **{"r": 2, "target_modules": TARGETS, **more, **options}).eval()


def step_of(model: Any) -> Callable[[], None]:
    def step() -> None:
        for b in batches():
            model(**b).loss.backward()

    return step


@pytest.mark.parametrize("options", [{}, {"direction": "ArBr", "scale": "gd_scale"}, {"scale": "weight_svd"}])
def test_one_expert_of_lora_ga_starts_as_in_peft(options: dict[str, Any]) -> None:
    base, given = tiny.base_model("llama"), peft.LoraGAConfig(**options)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="lora_ga", lora_ga_config=given)
    peft.preprocess_loraga(base, config, step_of(base))
    ours = converted("lora", r=4, lora_alpha=8)
    init_lora_ga(ours, batches(), seed=7, **options)
    for path, bank in banks(ours).items():
        torch.manual_seed(generator(7, path).initial_seed())
        layer = peft.tuners.lora.Linear(base.get_submodule(path), "default", config, r=4, lora_alpha=8)
        close(bank.lora_A, layer.lora_A["default"].weight, "same_math_fp32")
        close(bank.lora_B, layer.lora_B["default"].weight, "same_math_fp32")
        assert bank.lora_B.any()


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_one_expert_of_corda_starts_as_in_peft(method: Any) -> None:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    base = tiny.base_model("llama")
    corda = CordaConfig(corda_method=method)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights="corda", corda_config=corda)
    preprocess_corda(base, config, run_model=lambda: [base(**row) for row in ROWS] and None)
    theirs = peft.get_peft_model(base, config)
    ours = converted("lora", r=4, lora_alpha=8)
    init_corda(ours, ROWS, corda_method=method)
    for path, bank in banks(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        assert torch.equal(bank.lora_A, layer.lora_A["default"].weight)
        assert torch.equal(bank.lora_B, layer.lora_B["default"].weight)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("recipe", ["lora", "mixlora", "mola", "smora", "llava_mole"])
def test_a_mixture_starts_at_the_base_and_learns(recipe: str, init: str, tmp_path: Path) -> None:
    options = {**tiny.SMALL[recipe], "r": 8 if recipe == "smora" else 2}
    options |= {"num_experts": 3} if recipe == "mola" else {}  # at most 8 ranks: the narrowest linear has 16 directions
    model = tiny.base_model("llama")
    expected = tiny.output(model, tiny.batch("llama"))
    model = molora.convert(model, recipe, **options).eval()
    INITS[init](model)
    tiny.arm(model)  # the routers: no B is zero any more
    assert distance(tiny.output(model, tiny.batch("llama")), expected) < ROUNDING
    for bank in banks(model).values():
        shares = [tuple(bank.views(e)["lora_A"].flatten().tolist()) for e in range(len(bank.ranks))]
        assert len(set(shares)) == len(shares)
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(**tiny.batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval().save_pretrained(tmp_path)
    again = molora.load(tiny.base_model("llama"), tmp_path).eval()
    assert torch.equal(tiny.output(again, tiny.batch("llama")), tiny.output(model, tiny.batch("llama")))
    assert {s.takes_back for s in again._molora.sites if s.ranks} == {True}
    assert again._molora.sites == tuple(m.site for _, m in sites_of(again).values())


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
def test_transposed_weights_repeated_blocks_and_two_stacks(name: str) -> None:
    inputs = tiny.batch(name)
    rows = [{k: v[:1] for k, v in inputs.items()}]
    for init in (lambda m: init_lora_ga(m, [inputs]), lambda m: init_corda(m, rows)):
        base = tiny.base_model(name)
        expected = tiny.output(base, inputs)
        model = molora.convert(base, "mixlora", r=2, num_experts=3)
        init(model)
        assert all(bank.lora_B.any() for bank in banks(model).values())
        assert distance(tiny.output(tiny.arm(model).eval(), inputs), expected) < ROUNDING


@pytest.mark.parametrize("init", INITS)
def test_nothing_of_the_base_is_touched(init: str) -> None:
    """Weights, flags, gradients, hooks, attributes, mode: PEFT works on a copy that shares the storage."""
    model = converted()
    model.model.layers[0].mlp.up_proj.base_layer.weight.grad = torch.ones(48, 32)
    base = {n: p for n, p in model.named_parameters() if ".bank." not in n and ".router." not in n}
    before = {n: (p.clone(), p.requires_grad, p.data_ptr(), p.grad) for n, p in base.items()}
    attributes = {n: sorted(vars(m)) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = torch.random.get_rng_state()
    INITS[init](model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not model.training
    for n, p in base.items():
        value, flag, place, gradient = before[n]
        assert torch.equal(p, value)
        assert (p.requires_grad, p.data_ptr()) == (flag, place)
        assert p.grad is gradient
    assert {n: sorted(vars(m)) for n, m in model.named_modules() if isinstance(m, nn.Linear)} == attributes
    assert not any(m._forward_hooks or m._backward_hooks for m in model.modules())


def trained(init: Callable[[Any], None]) -> None:
    init(moved(converted()))


def unlabelled(_: Any = None) -> list[dict[str, Tensor]]:
    return [{k: v for k, v in b.items() if k != "labels"} for b in batches()]


def on_a_quantised_base(init: Callable[[Any], None]) -> None:
    init(converted(base=quantise(lambda: tiny.base_model("llama"), "torchao_int8")))


GA, CORDA = INITS["lora_ga"], INITS["corda ipm"]
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a plain model": (lambda: GA(tiny.base_model("llama")), "init_lora_ga: got a plain model"),
    "trained experts": (lambda: trained(CORDA), "init_corda: .* B is not zero"),
    "a second time": (lambda: [f(m) for m in [converted()] for f in (GA, GA)], "B is not zero"),
    "eva after it": (lambda: [f(m) for m in [converted()] for f in (GA, lambda m: init_eva(m, batches()))], "B is not"),
    "quantised": (lambda: on_a_quantised_base(GA), r"init_lora_ga: the weight of .* is quantised"),
    "quantised, too": (lambda: on_a_quantised_base(CORDA), r"init_corda: the weight of .* is quantised"),
    "twice the ranks": (lambda: GA(converted(num_experts=3, r=3)), "9 ranks in all, expected at most 8"),
    "too many ranks": (lambda: CORDA(converted(num_experts=3, r=6)), "18 ranks in all, expected at most 16"),
    "no labels": (lambda: init_lora_ga(converted(), unlabelled()), "returned no loss, expected batches with labels"),
    "no batches": (lambda: init_lora_ga(converted(), []), "got no gradient"),
    "unknown option": (
        lambda: init_lora_ga(converted(), batches(), gamma=2),
        "got the option 'gamma', .* stable_gamma",
    ),
    "unknown direction": (
        lambda: init_lora_ga(converted(), batches(), direction="up"),
        "direction: got 'up', expected .*ArB2r",
    ),
    "unknown method": (lambda: init_corda(converted(), ROWS, corda_method="kmp"), "expected one of ipm, kpm"),
    "several rows": (lambda: init_corda(converted(), batches()), "got several rows in 'input_ids'"),
    "padding": (lambda: init_corda(converted(), [{k: v[3:] for k, v in batches()[0].items()}]), "a row with padding"),
    "no rows": (lambda: init_corda(converted(), []), "init_corda: got no batches"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_from_data_is_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_refusal_leaves_the_experts_as_they_were() -> None:
    model = converted()
    before = copy.deepcopy(model.state_dict())
    broken = batches()
    broken[2]["input_ids"] = broken[2]["input_ids"][:, :3]
    for call in (lambda: init_lora_ga(model, broken), lambda: init_corda(model, [*ROWS, broken[0]])):
        with pytest.raises(ConfigError):
            call()
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
