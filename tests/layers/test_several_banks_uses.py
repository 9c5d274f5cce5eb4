"""What one does with a linear of several banks: save, count, change, export, copy, compile, switch by name, ZeRO."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import cpu_offload

import molora
from molora.adapter.config import ANY, expected_tensors
from molora.config import AlwaysOn
from molora.errors import ConfigError
from molora.interop.export import export_merged
from molora.layers.banks import banks_of
from molora.layers.linear import MixtureLinear
from molora.surgery.install import sites_of
from molora.surgery.state import saved_tensors
from molora.training.plan.counts import activation_widths, kinds_of, site_groups
from tests.layers.test_several_banks import BLOCKS, SHARED, always_of, config, converted, output
from tests.support import several_banks, tiny
from tests.support.programs import program
from tests.support.tolerances import close


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


def test_named_mixtures_switch_with_them() -> None:
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
    for name in ("", "a.b", "1", "x" * 65, "é", "router"):
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


@pytest.mark.parametrize("recipe", BLOCKS)
def test_they_are_called_where_they_are_offloaded(recipe: str) -> None:
    model = converted(recipe)
    expected = output(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in model.parameters())
    assert torch.equal(output(model), expected)


def test_a_plan_is_made_without_storage() -> None:
    with torch.device("meta"):
        base = tiny.base_model("llama").to("meta")
    for recipe in ("mola", "mixlora"):
        whole, meta = (molora.convert(b, config(recipe, SHARED)) for b in (tiny.base_model("llama"), base))
        assert kinds_of(meta) == kinds_of(whole)
        widths = activation_widths(meta)
        assert widths == activation_widths(whole)
        plain = activation_widths(molora.convert(tiny.base_model("llama"), config(recipe)))
        assert widths.ranks > plain.ranks
        assert (widths.packed > 0) == any(m.one_product for m in whole.modules() if isinstance(m, MixtureLinear))
        meta.unload()


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_under_zero_are_one(tmp_path: Path) -> None:
    printed = program("tests.support.several_banks", tmp_path)
    one = several_banks.train(tmp_path, 8)
    assert any(".always." in n for n in one["state"])
    for stage in several_banks.STAGES:
        path = tmp_path / f"zero{stage}.pt"
        assert path.exists(), printed[-3000:]
        both = torch.load(path)
        assert both["state"].keys() == one["state"].keys()
        for name, t in both["state"].items():
            close(t, one["state"][name], "additive")
