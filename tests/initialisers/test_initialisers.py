"""How experts start: as the installed PEFT starts its LoRA, each expert differently, and the model stays the base."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

import molora
from molora.config import MoloraConfig
from molora.errors import ConfigError
from molora.initialisers.from_weight import dealt
from molora.layers.linear import MixtureLinear
from molora.seeds import generator
from tests.support import tiny
from tests.support.tolerances import close

peft: Any = pytest.importorskip("peft", reason="the measure of these tests is the installed PEFT")

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
TRAINED_MIXTURES = ("mixlora", "mola", "llava_mole")
EXACT = (True, "gaussian", "mica")  # one of A and B is zero
ROUNDING = 1e-6  # B A of an orthogonal start in float32, relative to the base's outputs


def banks(model: nn.Module) -> dict[str, Any]:
    return {p: m.bank for p, m in model.named_modules() if isinstance(m, MixtureLinear) and m.bank is not None}


def peft_lora(name: str = "llama", targets: list[str] = TARGETS, **options: Any) -> Any:
    return peft.get_peft_model(tiny.base_model(name), peft.LoraConfig(target_modules=targets, **options)).eval()


def batches(count: int = 3, seed: int = 0) -> list[dict[str, Tensor]]:
    """Texts of 4 rows with padding at the end of the last."""
    out = [tiny.batch("llama", rows=4, length=20, seed=seed + i) for i in range(count)]
    for b in out:
        b["attention_mask"][3, 12:] = 0
    return out


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica"])
@pytest.mark.parametrize("recipe", TRAINED_MIXTURES)
def test_at_the_start_the_model_is_the_base_and_the_experts_differ(recipe: str, start: Any, tmp_path: Path):
    base = tiny.base_model("llama")
    expected, before = tiny.output(base, tiny.batch("llama")), {k: v.clone() for k, v in base.state_dict().items()}
    model = molora.convert(base, recipe, **{**tiny.SMALL[recipe], "r": 2, "init_lora_weights": start}).eval()
    found = tiny.output(model, tiny.batch("llama"))
    if start in EXACT:
        close(found, expected, "identity_ffn_fp32")  # only the weights' sum is rounded
    assert float((found - expected).norm() / expected.norm()) < ROUNDING
    for bank in banks(model).values():
        trained = [
            torch.cat([bank.expert(e)[0].flatten(), bank.expert(e)[1].flatten()]) for e in range(len(bank.ranks))
        ]
        assert len({tuple(t.tolist()) for t in trained}) == len(trained)
    plain = model.unload()
    assert all(torch.equal(v, before[k]) for k, v in plain.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_expert_of_mica_starts_and_learns_as_in_peft(name: str):
    targets = TARGETS if name == "llama" else ["c_attn", "c_fc", "mlp.c_proj"]
    theirs = peft_lora(name, targets, r=4, lora_alpha=16, init_lora_weights="mica", fan_in_fan_out=name == "gpt2")
    ours = molora.convert(tiny.base_model(name), "lora", r=4, target_modules=targets, init_lora_weights="mica").eval()
    for path, bank in banks(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        assert torch.equal(bank.lora_B, layer.lora_B["default"].weight)
        assert not bank.lora_A.any()
        assert (bank.lora_A.requires_grad, bank.lora_B.requires_grad) == (True, False)
    for model in (ours, theirs):
        model(**tiny.batch(name)).loss.backward()
    for path, bank in banks(ours).items():
        layer = theirs.base_model.model.get_submodule(path)
        close(bank.lora_A.grad, layer.lora_A["default"].weight.grad, "same_math_fp32")
        assert bank.lora_A.grad.abs().max() > 1e-4
        assert bank.lora_B.grad is None


@pytest.mark.parametrize("start", ["orthogonal", "mica", "pissa"])
@pytest.mark.parametrize("recipe", ["mixlora", "mola"])
def test_a_mixture_trains_from_there(recipe: str, start: str):
    options = {**tiny.SMALL[recipe], "r": 2, "num_experts": 4, "init_lora_weights": start}
    model = molora.convert(tiny.base_model("llama"), recipe, **options).train()
    frozen = {p: bank.lora_B.clone() for p, bank in banks(model).items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(5):
        loss = model(**tiny.batch("llama")).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(bank.lora_B, frozen[p]) == (start == "mica") for p, bank in banks(model).items())


def test_experts_of_mica_share_out_the_minor_singular_vectors():
    model = molora.convert(tiny.base_model("llama"), "mola", r=2, num_experts=3, init_lora_weights="mica")
    base = tiny.base_model("llama")
    for path, bank in banks(model).items():
        U_OK, _, _ = torch.linalg.svd(base.get_submodule(path).weight.detach(), full_matrices=False)
        picked = [(U_OK.T @ bank.expert(e)[1]).abs().argmax(0).tolist() for e in range(3)]
        K = U_OK.shape[1]
        assert picked == [[K - 4, K - 1], [K - 5, K - 2], [K - 6, K - 3]]
        close(bank.lora_B.T @ bank.lora_B, torch.eye(6), "svd_fp32")


def test_an_orthogonal_start_is_pefts_draw_for_each_expert():
    model = molora.convert(tiny.base_model("llama"), "mola", seed=5, r=4, num_experts=2, init_lora_weights="orthogonal")
    for path, bank in banks(model).items():
        for e in range(2):
            torch.manual_seed(generator(5, path, "orthogonal", str(e)).initial_seed())
            linear = nn.Linear(bank.lora_A.shape[1], bank.lora_B.shape[0], bias=False)
            torch.manual_seed(generator(5, path, "orthogonal", str(e)).initial_seed())
            config = peft.LoraConfig(init_lora_weights="orthogonal")
            layer = peft.tuners.lora.Linear(linear, "default", config, r=4, lora_alpha=4)
            A, B, _ = bank.expert(e)
            assert torch.equal(A, layer.lora_A["default"].weight)
            assert torch.equal(B, layer.lora_B["default"].weight)
            assert min(A.abs().max(), B.abs().max()) > 0.05
            assert (B @ A).abs().max() < ROUNDING


@pytest.mark.parametrize("start", [True, "gaussian"])
def test_the_other_starts_are_distributed_as_in_peft(start: Any):
    theirs = peft_lora(r=16, init_lora_weights=start)
    ours = banks(
        molora.convert(tiny.base_model("llama"), "lora", r=16, target_modules=TARGETS, init_lora_weights=start)
    )
    for path, bank in ours.items():
        weight = theirs.base_model.model.get_submodule(path).lora_A["default"].weight
        assert float(bank.lora_A.std() / weight.std()) == pytest.approx(1, abs=0.15)  # 512 draws each
        assert not bank.lora_B.any()
    limit = max(float(b.lora_A.abs().max() * b.lora_A.shape[1] ** 0.5) for b in ours.values())
    assert (limit <= 1) == (start is True)


@pytest.mark.parametrize("start", ["orthogonal", "mica", "pissa_niter_2"])
def test_a_start_is_the_seeds_alone_and_leaves_the_global_state(start: str):
    state = torch.random.get_rng_state()
    first = molora.convert(tiny.base_model("llama"), "mixlora", r=2, seed=3, init_lora_weights=start)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(7)
    again = molora.convert(tiny.base_model("llama"), "mixlora", r=2, seed=3, init_lora_weights=start)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("start", ["orthogonal", "mica", "pissa_niter_2", "olora"])
def test_a_start_survives_saving_and_needs_no_peft_to_load(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = molora.recipes.mixlora(r=2, num_experts=4, **yaml.safe_load(f"init_lora_weights: {start}"))
    assert MoloraConfig.from_dict(config.to_dict()) == config
    model = tiny.arm(molora.convert(tiny.base_model("llama"), config)).eval()
    model.save_pretrained(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    again = molora.load(tiny.base_model("llama"), tmp_path, trainable=True).eval()
    assert torch.equal(tiny.output(again, tiny.batch("llama")), tiny.output(model, tiny.batch("llama")))
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, again)]
    assert flags[0] == flags[1]
    with pytest.raises(ConfigError, match=r"pip install 'molora\[peft\]'"):
        molora.convert(tiny.base_model("llama"), config)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "pissa by no number of steps": (lambda: {"init_lora_weights": "pissa_niter_many"}, "expected one of .*_niter_"),
    "corda": (
        lambda: {"init_lora_weights": "corda"},
        "convert with True, then call molora.initialisers.corda.init_corda",
    ),
    "lora_ga": (lambda: {"init_lora_weights": "lora_ga"}, "then call molora.initialisers.lora_ga.init_lora_ga"),
    "loftq": (lambda: {"init_lora_weights": "loftq"}, "load the base quantised"),
    "eva": (lambda: {"init_lora_weights": "eva"}, "convert with True, then call molora.initialisers.eva.init_eva"),
    "unknown": (lambda: {"init_lora_weights": "orthogonl"}, "expected one of .*did you mean 'orthogonal'"),
    "odd ranks": (lambda: {"init_lora_weights": "orthogonal", "r": (2, 3)}, r"r=\(2, 3\), expected even ranks"),
    "odd by name": (
        lambda: {"init_lora_weights": "orthogonal", "rank_pattern": {"q_proj": 3}},
        "q_proj=3 with .* expected even ranks",
    ),
    "too many ranks": (lambda: {"init_lora_weights": "mica", "num_experts": 9, "r": 4}, "36 ranks in all, .* 32"),
    "too many to take back": (
        lambda: {"init_lora_weights": "pissa", "num_experts": 9, "r": 4},
        "'pissa': .* 36 ranks in all, .* 32",
    ),
    "two starts": (lambda: {"init_lora_weights": "mica", "init_from": "x"}, "expected one of the two starts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_start_that_cannot_be_is_refused_with_the_reason(case: str):
    make, words = REFUSED[case]
    model = tiny.base_model("llama")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=words):
        molora.convert(model, "llava_mole", **{"r": 2, "lora_alpha": 4, **make()})
    assert type(model) is type(tiny.base_model("llama"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_start_from_the_weight_needs_a_weight_to_read():
    model = tiny.base_model("llama")
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.ones(48, 32, dtype=torch.int8), False)
    with pytest.raises(ConfigError, match=r"up_proj is a Linear whose weight cannot be read"):
        molora.convert(model, "lora", r=2, init_lora_weights="mica")
    empty = molora.convert(tiny.base_model("llama").to("meta"), "lora", r=2, init_lora_weights="mica")
    assert {b.lora_B.device.type for b in banks(empty).values()} == {"meta"}
    with pytest.raises(ConfigError, match="experts of one rank, expected even ranks"):
        molora.recipes.smora(init_lora_weights="orthogonal")
    for start in ("mica", "pissa", "olora"):
        with pytest.raises(ConfigError, match="ready-made"):
            molora.recipes.xlora(adapters={"a": "x"}, init_lora_weights=start)


def test_ranks_are_dealt_out_in_turn():
    assert dealt([2, 3, 0, 1]) == [[0, 3], [1, 4, 5], [], [2]]
