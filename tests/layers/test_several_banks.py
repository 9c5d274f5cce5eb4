"""Several banks on one linear: a routed one, and others that are always on, as if they were part of its weight."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import molora
from molora import recipes
from molora.adapter.config import ANY, expected_tensors
from molora.config import AlwaysOn, MoloraConfig
from molora.errors import AdapterError, ConfigError
from molora.interop.export import export_merged
from molora.layers.banks import banks_of
from molora.layers.ffn import FFNDown, FFNRows, FFNUp
from molora.layers.linear import MixtureLinear
from molora.surgery.install import sites_of
from molora.surgery.state import saved_tensors
from molora.training.plan.counts import kinds_of, site_groups
from tests.layers.test_ffn import by_hand, silu_gated, toy
from tests.support import tiny
from tests.support.behaviours import options
from tests.support.tolerances import close

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
@pytest.mark.parametrize("recipe", ["lora", "mola", "smora", "llava_mole"])
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


@pytest.mark.parametrize("recipe", [*BLOCKS, "xlora"])
def test_it_is_saved_loaded_and_counted(recipe: str, tmp_path: Path) -> None:
    model = converted(recipe)
    model.save_pretrained(tmp_path)
    sites = json.loads((tmp_path / "adapter_config.json").read_text())["sites"]
    own = [{"name": "shared", "r": 3, "scale": 2.0}, {"name": "error", "r": 2, "scale": 0.5, "bank": "frozen_ranks"}]
    assert all(s["banks"] == own for s in sites if s.get("ranks"))
    again = molora.load(tiny.base_model("llama"), tmp_path, trainable=True).eval()
    assert torch.equal(output(again), output(model))
    flags = [{n: p.requires_grad for n, p in m.named_parameters()} for m in (model, again)]
    assert flags[0] == flags[1]
    assert {n.rpartition(".")[2] for n, on in flags[0].items() if ".always." in n and on} == {"lora_A", "lora_B"}
    shapes = {n: tuple(t.shape) for n, t in saved_tensors(model).items()}
    for name, shape in expected_tensors(model._molora.config, model._molora.sites).items():
        found = shapes.pop(name)
        assert [n for n, e in zip(found, shape, strict=True) if e not in (ANY, n)] == []
    assert shapes == {}
    kinds = {k.name: k.parameters for k in kinds_of(model)}
    always = sum(p.numel() for n, p in model.named_parameters() if ".always." in n)
    assert kinds["A, always on"] + kinds["B, always on"] + kinds["frozen ranks, always on"] == always > 0
    assert sum(kinds.values()) == sum(p.numel() for p in model.parameters())
    assert min(site_groups(model)[0].ranks) > 5
    assert "experts, A, always on" in (tmp_path / "README.md").read_text()
    state = {n: t for n, t in model.state_dict().items() if ".always.error" not in n}
    with pytest.raises(molora.errors.CheckpointError, match=r"missing: .*always\.error"):
        model.save_pretrained(tmp_path, state_dict=state)


@pytest.mark.parametrize("recipe", ["mixlora", "mola", "smora"])
def test_experts_come_and_go_beside_them(recipe: str) -> None:
    model = converted(recipe, **({} if recipe == "smora" else {"top_k": 2}))
    before = {n: t.clone() for n, t in saved_tensors(model).items() if ".always." in n}
    expected = output(model)
    model.add_expert()
    close(output(model), expected, "same_math_fp32")
    model.prune_experts([0])
    now = saved_tensors(model)
    assert all(torch.equal(t, now[n]) for n, t in before.items())
    for _, m in sites_of(model).values():
        if isinstance(m, MixtureLinear) and m.one_product:
            assert m.always is not None
            assert m.always.layout.ranks == (*m.bank.packed()[2].ranks, 3, 4)
    kept = output(model)
    model.merge_always_on("shared")
    model.merge_always_on("error")
    close(output(model), kept, "same_math_fp32")


@pytest.mark.parametrize("recipe", ["lora", "mola", "mixlora"])
def test_each_leaves_by_name(recipe: str, tmp_path: Path) -> None:
    model = converted(recipe, **({} if recipe == "lora" else {"num_experts": 3}))
    for name in ("shared", "error"):
        model.export_expert(name, tmp_path / name)
        theirs = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / name).base_model.model
        for _, m in sites_of(model).values():
            A, B, s = banks_of(m)[f"always.{name}"].as_lora(0)
            close(theirs.get_submodule(m.site.path).get_delta_weight("default"), s * B @ A, "peft_lora")
    model.export_expert(0, tmp_path / "first")
    weights = [0.5] + [0.0] * (max(m.site.num_experts for _, m in sites_of(model).values()) - 1)
    own = weights if recipe != "lora" else [1.0]
    if recipe != "mixlora":  # whose attention has experts of another number
        export_merged(model, tmp_path / "merged", own)
        merged = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / "merged").base_model.model
    first = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / "first").base_model.model
    for _, m in sites_of(model).values():
        A, B, s = m.bank.as_lora(0)
        close(first.get_submodule(m.site.path).get_delta_weight("default"), s * B @ A, "peft_lora")
        if recipe != "mixlora":
            wanted = own[0] * s * B @ A + always_of(m)
            close(merged.get_submodule(m.site.path).get_delta_weight("default"), wanted, "peft_lora")
    with pytest.raises(ConfigError, match="got 'shred', expected one of .*shared"):
        model.export_expert("shred", tmp_path / "none")
    if recipe == "lora":
        expected = output(model)
        close(output(model.merge_and_unload()), expected, "same_math_fp32")


@pytest.mark.parametrize("recipe", BLOCKS)
def test_copies_compute_the_same(recipe: str) -> None:
    model = converted(recipe)
    again = copy.deepcopy(model)
    assert torch.equal(output(again), output(model))
    wide = copy.deepcopy(model).double().float()
    assert torch.equal(output(wide), output(model))
    assert torch.equal(output(model.unload()), output(tiny.base_model("llama")))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", BLOCKS)
def test_the_compiler_sees_one_graph(recipe: str) -> None:
    torch._dynamo.reset()
    model = converted(recipe)
    expected = output(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(output(compiled), expected)
    torch._dynamo.reset()


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


def test_named_mixtures_switch_with_them() -> None:
    from molora.peft_tuner.settings import MixtureConfig

    assert MixtureConfig
    made = molora.peft_config("mola", r=2, num_experts=2, target_modules=["q_proj"])
    made.config = made.config.replace(placements=tuple(p.replace(always=(SHARED,)) for p in made.config.placements))
    model: Any = peft.get_peft_model(tiny.base_model("llama"), made)
    model.add_adapter("plain", molora.peft_config("mola", r=2, num_experts=2, target_modules=["q_proj"]))
    inner = model.base_model.model
    tiny.arm(inner)
    model.eval()
    first = output(inner)
    keys = {n for n, p in model.named_parameters() if p.requires_grad and ".always." in n}
    assert {n.rpartition(".")[2] for n in keys} == {"lora_A", "lora_B"}
    model.set_adapter("plain")
    assert not torch.equal(output(inner), first)
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".always." in n)
    model.set_adapter("default")
    assert torch.equal(output(inner), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad and ".always." in n} == keys


def test_what_cannot_be_is_refused() -> None:
    for name in ("", "a.b", "1", "x" * 65, "é"):
        with pytest.raises(ConfigError, match="name: got"):
            AlwaysOn(name=name)
    with pytest.raises(ConfigError, match=r"always: got the names \('shared', 'shared'\), expected each once"):
        config("mola", SHARED, SHARED)
    for name in ("packed", "training", "expert_R", "to"):
        with pytest.raises(ConfigError, match="expected another one"):
            converted("mola", AlwaysOn(name=name))
    with pytest.raises(ConfigError, match="expected one of plain, frozen_ranks"):
        converted("mola", AlwaysOn(name="odd", bank="odd"))
    with pytest.raises(ConfigError, match="which are adapters too"):
        config("meteora", AlwaysOn(name="math"))
    with pytest.raises(ConfigError, match="they are for linears"):
        config("lora", SHARED, target_parameters=["experts.down_proj"])


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_under_zero2_are_one(tmp_path: Path) -> None:
    from tests.support import several_banks
    from tests.support.programs import program

    printed = program("tests.support.several_banks", tmp_path)
    path = tmp_path / "both.pt"
    assert path.exists(), printed[-3000:]
    both, one = torch.load(path), several_banks.train(tmp_path, 8)
    assert both["state"].keys() == one["state"].keys()
    assert any(".always." in n for n in one["state"])
    for name, t in both["state"].items():
        close(t, one["state"][name], "additive")
