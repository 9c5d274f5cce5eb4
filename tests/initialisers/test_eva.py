"""EVA: experts start from the directions of the data, as PEFT finds them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import molora
from molora.errors import ConfigError
from molora.initialisers.eva import init_eva
from tests.initialisers.test_initialisers import TARGETS, banks, batches, peft, peft_lora
from tests.support import tiny
from tests.support.tolerances import close


def converted(recipe: str = "mola", **options: Any) -> Any:
    return molora.convert(tiny.base_model("llama"), recipe, **{"r": 2, "target_modules": TARGETS, **options}).eval()


def test_one_expert_starts_as_in_peft():
    data = batches()
    theirs = peft_lora(r=4, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    peft.initialize_lora_eva_weights(theirs, data, show_progress_bar=False)
    ours = converted("lora", r=4)
    init_eva(ours, data)
    for path, bank in banks(ours).items():
        assert torch.equal(bank.lora_A, theirs.base_model.model.get_submodule(path).lora_A["default"].weight)
        assert not bank.lora_B.any()


def test_experts_share_out_the_directions_and_the_model_stays_the_base():
    model, one, data = converted(num_experts=(2, 3)), converted("lora", r=6), batches()
    expected = tiny.output(tiny.base_model("llama"), data[0])
    init_eva(model, data)
    init_eva(one, data)
    assert torch.equal(tiny.output(model, data[0]), expected)
    assert not any(m._forward_hooks for m in model.modules())
    whole = {p: b.lora_A for p, b in banks(one).items()}
    for path, bank in banks(model).items():
        E = len(bank.ranks)
        for e in range(E):
            assert torch.equal(bank.expert(e)[0], whole[path][[e, e + E]])
        close(bank.lora_A @ bank.lora_A.T, torch.eye(2 * E), "svd_fp32")


def test_the_first_direction_holds_the_most_of_the_inputs():
    model, data = converted("lora", r=4, target_modules=["up_proj"]), batches(1)
    init_eva(model, data)
    seen = []
    up = model.get_submodule("model.layers.0.mlp.up_proj")
    hook = up.register_forward_pre_hook(lambda _, args: seen.append(args[0][data[0]["attention_mask"].bool()]))
    tiny.output(model, data[0])
    hook.remove()
    spread = (seen[0] @ up.bank.lora_A.T).var(0)
    assert spread.tolist() == sorted(spread.tolist(), reverse=True)
    assert spread[0] > 2 * seen[0].var(0).mean()


def test_the_mixture_trains_from_there():
    model, data = converted("mixlora", num_experts=4, target_modules="all-linear").train(), batches()
    init_eva(model, data)
    assert model.training
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(4):
        loss = model(**data[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01


def trained() -> Any:
    return tiny.arm(converted())


def foreign() -> Any:
    """A linear of another class than PEFT's hooks look for, such as a quantiser's."""
    base = tiny.base_model("llama")

    class Other(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x)

    base.model.layers[0].mlp.up_proj = Other(base.model.layers[0].mlp.up_proj)
    return molora.convert(base, "lora", r=2, target_modules=["mlp.up_proj"])


FEW = [{k: v[:1, :3] for k, v in b.items()} for b in batches()]
REFUSED: dict[str, Any] = {
    "plain model": (lambda: tiny.base_model("llama"), batches(), "call molora.convert first"),
    "trained": (trained, batches(), "B is not zero"),
    "another start": (lambda: converted(init_lora_weights=False), batches(), "B is not zero"),
    "too many ranks": (lambda: converted(num_experts=8, r=8), batches(), "64 ranks in all .* at most 32"),
    "batches too small": (lambda: converted("lora", r=8), FEW, "still change after 30 batches"),
    "no batches": (lambda: converted(), [], "EVA cannot use these batches .*empty"),
    "not this model's": (lambda: converted(), [{"pixels": torch.ones(2, 3)}], "EVA cannot use these batches"),
    "a linear of another kind": (foreign, batches(), "expected a linear that PEFT knows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_from_data_is_refused_and_nothing_is_changed(case: str):
    make, data, words = REFUSED[case]
    model = make()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        init_eva(model, data, max_batches=30)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


def test_ready_made_experts_have_nothing_to_start(tmp_path: Any):
    model = tiny.converted("xlora", "llama", tmp_path)
    with pytest.raises(ConfigError, match="without trainable experts"):
        init_eva(model, batches())


def test_a_threshold_that_peft_does_not_take_is_refused():
    with pytest.raises(ConfigError, match="EVA cannot use these batches .*tau"):
        init_eva(converted(), batches(), tau=2.0)
