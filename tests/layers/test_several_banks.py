"""Several banks on one linear: a routed one, and others that are always on, as if they were part of its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora import recipes
from molora.config import AlwaysOn, MoloraConfig
from molora.errors import AdapterError, ConfigError
from molora.layers.banks import banks_of
from molora.layers.ffn import FFNDown, FFNRows, FFNUp
from molora.layers.linear import MixtureLinear
from molora.surgery.install import sites_of
from molora.surgery.state import saved_tensors
from tests.layers.test_ffn import by_hand, silu_gated, toy
from tests.support import tiny
from tests.support.behaviours import options
from tests.support.tolerances import close
from tests.support.traits import having

SHARED = AlwaysOn(name="shared", r=3, lora_alpha=6.0)
ERROR = AlwaysOn(name="error", r=2, lora_alpha=1.0, bank="frozen_ranks")
BLOCKS = ("mixlora", "mola", "lora")


def config(recipe: str, *always: AlwaysOn, **more: Any) -> MoloraConfig:
    """The small version of a recipe with these always-on experts in each placement."""
    made = molora.RECIPES[recipe](**options(recipe, "llama", **more))
    return made.replace(placements=tuple(p.replace(always=always) for p in made.placements))


def converted(recipe: str, *always: AlwaysOn, base: Any = None, **more: Any) -> Any:
    """On the tiny Llama, every B and router with values of its own."""
    base = tiny.base_model("llama") if base is None else base
    model: Any = tiny.arm(molora.convert(base, config(recipe, *(always or (SHARED, ERROR)), **more)))
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if ".always." in name and ".frozen_" in name:
                p.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(i))
    return model.eval()


def output(model: Any) -> Tensor:
    return tiny.output(model, tiny.batch("llama"))


def always_of(m: Any) -> Tensor:
    """The change of the weight that is always on, ``sum_a s_a B_a A_a``."""
    out = torch.zeros(m.out_features, m.in_features, dtype=m.bank.lora_A.dtype)
    for name, bank in banks_of(m).items():
        if name != "bank":
            A, B, s = bank.expert(0)
            out = out + s * B @ A
    return out


@pytest.mark.parametrize("kernel", ["torch", "loop"])
@pytest.mark.parametrize("recipe", having(lambda t: not t.imported and not t.mixes_blocks))
def test_a_linear_is_the_loop_over_all_banks(recipe: str, kernel: str) -> None:
    """float64, outputs and the gradients of every bank; the router's are float32."""
    model = converted(recipe, kernel=kernel).double()
    for path in ("model.layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"):  # with routers of their own
        m = model.get_submodule(path)
        x = torch.randn(7, m.in_features, dtype=torch.float64)
        got = m(x)
        weights = torch.ones(7, 1) if m.always_on else m.route(x).dense()
        expected = m.base_layer(x) + x @ always_of(m).T
        for e in range(m.site.num_experts):
            A, B, s = m.bank.expert(e)
            expected = expected + weights[:, e : e + 1].double() * s * (x @ A.T @ B.T)
        close(got, expected, "formula")
        inputs = [p for n, p in m.named_parameters() if p.requires_grad and "router" not in n]
        assert len([n for n, p in m.named_parameters() if p.requires_grad and ".always" in f".{n}"]) == 4
        probe = torch.randn_like(got)
        for a, b in zip(*(torch.autograd.grad(y, inputs, probe, allow_unused=True) for y in (got, expected)),
                        strict=True):  # fmt: skip
            close(*(torch.zeros(1) if t is None else t for t in (a, b)), "formula")


class Shifted(nn.Module):
    """A linear with the always-on change of a site in its weight."""

    def __init__(self, m: Any) -> None:
        super().__init__()
        self.site, self.bank, self.m, self.bias = m.site, m.bank, m, m.bias
        self.out_features = m.out_features

    def base_layer(self, x: Tensor) -> Tensor:
        return self.m.base_layer(x) + x @ always_of(self.m).T  # type: ignore[no-any-return]


@pytest.mark.parametrize("routing", [{"top_k": 2}, {"routing": "top_p", "top_p": 0.6}])
@pytest.mark.parametrize("kernel", ["torch", "loop"])
def test_a_block_is_the_loop_with_the_banks_in_its_linears(kernel: str, routing: dict[str, Any]) -> None:
    """float64, as a gated unit (without gradients) and with a slot axis; weights need not sum to 1."""
    model = converted("mixlora", kernel=kernel, **routing).double()
    block = model.model.layers[1].mlp
    sites = [block.gate_proj, block.up_proj, block.down_proj]
    assert [type(m) for m in sites] == [FFNUp, FFNUp, FFNDown]
    x = torch.randn(7, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    routed = sites[0].route(x)
    expected = by_hand([Shifted(m) for m in sites], silu_gated, x, _double(routed))
    got = block(x)
    close(got, expected, "formula")
    with torch.no_grad():
        close(block(x), expected, "formula")
    inputs = [p for n, p in block.named_parameters() if p.requires_grad and "router" not in n]
    probe = torch.randn_like(got)
    ours, theirs = (torch.autograd.grad(y, inputs, probe, allow_unused=True) for y in (got, expected))
    for a, b in zip(ours, theirs, strict=True):
        close(*(torch.zeros(1) if t is None else t for t in (a, b)), "formula")


def _double(routing: Any) -> Any:
    return routing.decided(routing.weights.double(), routing.ids)


def test_a_block_that_runs_once_per_expert_is_the_same_with_slots() -> None:
    made = recipes.mixlora(r=4, num_experts=4, target_modules="all-linear")
    own = made.replace(placements=tuple(p.replace(always=(SHARED,)) for p in made.placements))
    models = [tiny.arm(molora.convert(toy(middle), own)) for middle in ("plain", "sized")]
    assert any(isinstance(m, FFNRows) for m in models[1].modules())
    slots, rows = ({m.site.path: m for m in x.modules() if isinstance(m, MixtureLinear)} for x in models)
    assert slots.keys() == rows.keys()
    for (_, a), (_, b) in zip(sorted(slots.items()), sorted(rows.items()), strict=True):
        for name, bank in banks_of(a).items():
            banks_of(b)[name].load_state_dict(bank.state_dict())
    routers = [[m.router for m in x.modules() if getattr(m, "router", None) is not None] for x in models]
    for a, b in zip(*routers, strict=True):
        b.load_state_dict(a.state_dict())
    ids = torch.arange(10).view(2, 5)
    a, b = (m.eval()(ids) for m in models)
    close(b, a, "same_math_fp32")
    assert (models[0].layers[0].ffn.up.always.shared.lora_B != 0).any()


@pytest.mark.parametrize("recipe", tiny.RECIPES)
def test_every_recipe_with_them_merged_into_the_base_is_the_same_model(recipe: str, tmp_path: Path) -> None:
    """Outputs and routing; merging one by one, then what is left is the recipe alone on another base."""
    model = converted(recipe)
    expected, base = output(model), output(tiny.base_model("llama"))
    with molora.record_routing(model) as tape:
        output(model)
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    before = {n: t.clone() for n, t in saved_tensors(model).items() if ".always." not in n}
    model.merge_always_on("shared")
    close(output(model), expected, "same_math_fp32")
    assert {b.name for s in model._molora.sites for b in s.banks} == {"error"}
    model.merge_always_on("error")
    close(output(model), expected, "same_math_fp32")
    with molora.record_routing(model) as merged:
        output(model)
    for path, records in tape.items():
        for a, b in zip(records, merged[path], strict=True):
            close(a.dense(), b.dense(), "same_math_fp32")
            assert a.dense().shape[1] == before_experts(model, path)
    assert {n: t for n, t in saved_tensors(model).items() if not torch.equal(t, before[n])} == {}
    assert model._molora.config == config(recipe).replace(placements=model._molora.config.placements)
    assert not any(p.always for p in model._molora.config.placements)
    model.save_pretrained(tmp_path)
    assert '"banks"' not in (tmp_path / "adapter_config.json").read_text()
    with pytest.raises(ConfigError, match="got 'error', expected one of none"):
        model.merge_always_on("error")


def before_experts(model: Any, path: str) -> int:
    return next(m.site.num_experts for _, m in sites_of(model).values() if m.site.path == path)


class Int8(nn.Module):
    """A linear whose weight is bytes and one scale, as quantised layers are: it can be called, never read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, None
        self.step = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.step).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step)


@pytest.mark.parametrize("recipe", ["mola", "mixlora"])
def test_on_a_quantised_base(recipe: str) -> None:
    """The same as on the base in floating point with the same values; only a merge needs to read the weight."""
    packed, plain = tiny.base_model("llama"), tiny.base_model("llama")
    for path, module in list(packed.named_modules()):
        if type(module) is nn.Linear and ".layers." in path:
            packed.set_submodule(path, Int8(module))
            own = packed.get_submodule(path)
            plain.get_submodule(path).weight.data = own.weight.float() * own.step
    models = [converted(recipe, base=base) for base in (packed, plain)]
    for model in models:
        model.train()(**tiny.batch("llama")).loss.backward()
    for (n, a), (_, b) in zip(*(m.named_parameters() for m in models), strict=True):
        if ".always." in n and a.requires_grad:
            close(a.grad, b.grad, "same_math_fp32")
    close(*(output(m.eval()) for m in models), "same_math_fp32")
    before = output(models[0])
    with pytest.raises(AdapterError, match="only plain float linears"):
        models[0].merge_always_on("shared")
    assert torch.equal(output(models[0]), before)


@pytest.mark.parametrize("recipe", ["mola", "mixlora"])
def test_dropout_has_one_mask_for_all(recipe: str) -> None:
    """An always-on expert that is the opposite of the only routed one cancels it, whatever is dropped."""
    more = {"lora_dropout": 0.5, "num_experts": 1, "top_k": 1, "router_aux_loss_coef": 0.1}
    model = converted(recipe, AlwaysOn(name="opposite", r=4, lora_alpha=4.0), **more).train()
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    block = model.model.layers[0].mlp
    for m in (block.gate_proj, block.up_proj, block.down_proj, model.model.layers[0].self_attn.q_proj):
        A, B, s = m.bank.expert(0)
        m.always.opposite.set_expert(0, A, -B * s)
    base = tiny.base_model("llama").model.layers[0].mlp
    torch.manual_seed(0)
    with torch.no_grad():
        close(block(x), base(x), "same_math_fp32")


@pytest.mark.parametrize("recipe", ["mola", "llava_mole"])
def test_a_linear_stays_one_product(recipe: str) -> None:
    """As many matrix products as without them, and what is there without them has no operation more."""

    class Products(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += any(name in str(func) for name in (".mm", ".addmm", "linear", ".bmm"))
            return func(*args, **(kwargs or {}))

    counts = []
    for always in ((), (SHARED, ERROR)):
        model = molora.convert(tiny.base_model("llama"), config(recipe, *always)).eval()
        m = model.model.layers[0].self_attn.q_proj
        with torch.no_grad(), Products() as products:
            m(torch.randn(5, 32))
        counts.append(products.count)
    assert counts[0] == counts[1] > 0
