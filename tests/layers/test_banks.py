"""Each kind of bank through one life, on its own smallest config; a kind with a third parameter added from outside."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import molora
from molora.adapter.config import expected_tensors
from molora.config import BalanceConfig, GateConfig, MoloraConfig, Placement, RouterConfig, SiteConfig
from molora.errors import AdapterError, ConfigError
from molora.eval.ablation.lesions import silenced
from molora.initialisers import INITIALISERS, Initialiser, draw
from molora.interop.export import export_merged
from molora.layers.banks import BANKS, Bank, banks_of
from molora.layers.banks.plain import ExpertBank
from molora.layers.linear import MixtureLinear
from molora.seeds import generator
from molora.surgery.install import sites_of
from molora.surgery.state import saved_tensors
from molora.training.plan.counts import activation_widths, kinds_of
from tests.layers.test_fused_experts import BOTH
from tests.support import families, tiny
from tests.support.added_things import added
from tests.support.tolerances import close

KINDS = ("plain", "frozen_ranks", "diagonal")
UNITS: dict[str, dict[str, Any]] = {
    "linear": {},
    "ffn": {"unit": "ffn", "select": "ffn", "router": RouterConfig(scope="block")},
}


@pytest.fixture(autouse=True)
def diagonal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A third kind, which comes from outside."""
    with added(tmp_path_factory.mktemp("added"), "diagonal_bank"):
        yield


def config(kind: str, unit: str = "linear", **more: Any) -> MoloraConfig:
    own = {"bank": kind, **BANKS[kind].tiny(), **UNITS[unit]}
    gate, balance = GateConfig(top_k=2, renormalize="one"), (BalanceConfig(kind="switch", coef=0.01),)
    return MoloraConfig(recipe="mola", placements=(Placement(**{**own, "gate": gate, "balance": balance, **more}),))


def moved(model: Any, steps: int = 2) -> Any:
    """After some steps of training, so that every parameter is its own."""
    learned = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.5)
    for seed in range(steps):
        model(**tiny.batch("llama", seed=seed)).loss.backward()
        assert all(p.grad is not None for p in learned)
        optimizer.step()
        optimizer.zero_grad()
    return tiny.arm(model).eval()


def converted(kind: str, unit: str = "linear", **more: Any) -> Any:
    return molora.convert(tiny.base_model("llama"), config(kind, unit, **more))


def banks(model: Any) -> dict[str, Bank]:
    return {f"{path}.{n}": b for path, m in sites_of(model).values() for n, b in banks_of(m).items()}


def output(model: Any) -> Tensor:
    return tiny.output(model, tiny.batch("llama"))


def site(kind: str, **more: Any) -> SiteConfig:
    sizes = {"in_features": 6, "out_features": 5, "num_experts": 3, "ranks": (2,), "scales": (0.5,)}
    return SiteConfig(path="a", placement=0, **{**sizes, **more}).of_kind(kind)


def made(kind: str, device: str = "cpu", **more: Any) -> Bank:
    bank = BANKS[kind](site(kind, **more), train=True, dtype=torch.float32, device=torch.device(device))
    if device != "meta":
        draw(bank, INITIALISERS["random"], generator(0, kind))
        with torch.no_grad():
            for p in bank.parameters():
                p.add_(torch.rand(p.shape, generator=generator(1, kind)))
    return bank


def test_every_kind_of_the_table_is_tested_here() -> None:
    assert tuple(BANKS) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_a_site_alone_tells_names_shapes_and_what_trains(kind: str) -> None:
    entry, bank = BANKS[kind], made(kind)
    for b in (bank, made(kind, "meta")):
        assert {n: tuple(p.shape) for n, p in b.named_parameters()} == entry.shapes(site(kind))
        assert {n for n, p in b.named_parameters() if p.requires_grad} == entry.trained(site(kind), True)
    assert not entry.trained(site(kind), False)
    assert not entry.trained(site(kind), True, False) & set(entry.output)
    A, B, layout = bank.packed()
    assert layout.ranks == entry.packed_ranks(site(kind))
    assert (A.shape, B.shape) == ((sum(layout.ranks), 6), (5, sum(layout.ranks)))
    assert (A is bank.lora_A) == (entry.copied(site(kind)) == 0)
    assert [n for n, b in bank.named_buffers() if n in bank.state_dict()] == []


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_read_written_silenced_and_resized(kind: str) -> None:
    bank = made(kind)
    A, B, layout = bank.packed()
    for e in range(3):
        own, start = layout.ranks[e], sum(layout.ranks[:e])
        for given in (bank.expert(e), bank.as_lora(e)):
            assert torch.equal(given[0], A[start : start + own])
            assert torch.equal(given[1], B[:, start : start + own])
            assert given[2] == 0.5
    before = {n: p.clone() for n, p in bank.named_parameters()}
    rng = generator(3, kind)
    resized = bank.resized(
        site(kind, num_experts=4), (2, None, 0, 1), functools.partial(draw, start=Initialiser, generator=rng)
    )
    assert type(resized) is type(bank)
    assert {n: p.requires_grad for n, p in resized.named_parameters()} == {
        n: p.requires_grad for n, p in bank.named_parameters()
    }
    for e, source in ((0, 2), (2, 0), (3, 1)):
        theirs = bank.views(source)
        assert all(torch.equal(view, theirs[n]) for n, view in resized.views(e).items())
    A1, B1, _ = resized.expert(1)
    assert not (B1 @ A1).any()
    assert all(p.isfinite().all() for p in resized.parameters())
    bank.silence(1)
    A1, B1, _ = bank.expert(1)
    assert not (B1 @ A1).any()
    for e in (0, 2):
        assert all(torch.equal(v, w) for v, w in zip(bank.views(e).values(), _of(before, bank, e), strict=True))
    A_new, B_new = torch.ones(2, 6), torch.full((5, 2), 2.0)
    bank.set_expert(1, A_new, B_new)
    A1, B1, _ = bank.expert(1)
    close(B1 @ A1, B_new @ A_new, "same_math_fp32")
    with pytest.raises(AdapterError, match="expert 1: got A"):
        bank.set_expert(1, torch.ones(3, 6), B_new)


def _of(before: dict[str, Tensor], bank: Bank, e: int) -> list[Tensor]:
    again = copy.deepcopy(bank)
    again.load_state_dict(before)
    return [*again.views(e).values()]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_survive_copies_casts_and_moves(kind: str) -> None:
    bank = made(kind)
    maps = [b.clone() for b in (bank.expert_R, bank.scale_R, bank.slot_gate_ER, bank.start_E)]
    meta = made(kind, "meta")
    meta.packed()
    for again in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank)), copy.deepcopy(bank).double().half(),
                  meta.to_empty(device="cpu")):  # fmt: skip
        layout = again.packed()[2]
        found = layout.expert_R, layout.scale_R, layout.slot_gate_ER, layout.start_E
        assert all(a is not None and a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, maps, strict=True))
    cast = copy.deepcopy(bank).to(torch.bfloat16)
    assert {t.dtype for t in cast.packed()[:2]} == {torch.bfloat16}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_life(kind: str, unit: str, tmp_path: Path) -> None:
    """Convert, train, save, load, look inside, add, prune, export, switch off, unload."""
    base = output(tiny.base_model("llama"))
    model = converted(kind, unit)
    close(output(model), base, "same_math_fp32")  # to rounding: a start is taken back in another order
    moved(model)
    expected = output(model)
    assert not torch.allclose(expected, base)
    assert torch.equal(output(copy.deepcopy(model)), expected)
    model.save_pretrained(tmp_path / "saved")
    written = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    kinds = {s.get("bank", "frozen_ranks" if s.get("takes_back") else "plain") for s in written["sites"]}
    assert kinds == {kind}
    again = molora.load(tiny.base_model("llama"), tmp_path / "saved", trainable=True).eval()
    assert torch.equal(output(again), expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    shapes = {n: tuple(t.shape) for n, t in saved_tensors(model).items()}
    assert expected_tensors(model._molora.config, model._molora.sites) == shapes
    assert sum(k.parameters for k in kinds_of(model)) == sum(p.numel() for p in model.parameters())
    assert activation_widths(model).ranks > 0
    lead = next(path for path, m in sites_of(model).values() if m.router is not None)
    with silenced(model, {lead: 0}):
        assert not torch.equal(output(model), expected)
    assert torch.equal(output(model), expected)
    model.export_expert(1, tmp_path / "one")
    theirs = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / "one").base_model.model
    export_merged(model, tmp_path / "merged", [0.5, 0.25, 0.25])
    for _, m in sites_of(model).values():
        assert isinstance(m, MixtureLinear)
        assert m.bank is not None
        A, B, s = m.bank.as_lora(1)
        close(theirs.get_submodule(m.site.path).get_delta_weight("default"), s * B @ A, "peft_lora")
    with model.disable_adapter():
        assert torch.equal(output(model), base)
    before = {n: [{k: v.clone() for k, v in b.views(e).items()} for e in range(3)] for n, b in banks(model).items()}
    model.add_expert()
    close(output(model), expected, "same_math_fp32")
    model.prune_experts([1])
    for name, bank in banks(model).items():
        for e, source in enumerate((0, 2)):
            assert all(torch.equal(v, before[name][source][k]) for k, v in bank.views(e).items())
    model.save_pretrained(tmp_path / "changed")
    again = molora.load(tiny.base_model("llama"), tmp_path / "changed").eval()
    assert torch.equal(output(again), output(model))
    assert torch.equal(output(model.unload()), base)


@pytest.mark.slow
@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_compiler_sees_one_graph(kind: str, unit: str) -> None:
    torch._dynamo.reset()
    model = moved(converted(kind, unit))
    expected = output(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(output(compiled), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_named_mixtures_train_what_the_kind_trains(kind: str) -> None:
    model = moved(converted(kind))
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    from molora.peft_tuner.weights import trained

    names = saved_tensors(model, {n: n for n in model.state_dict()})
    learned = trained(model._molora, names)
    assert learned == {n for n, now in names.items() if flags[now]}


@pytest.mark.parametrize("kind", KINDS)
def test_stacked_experts_of_a_base_take_the_kinds_that_allow_it(kind: str, tmp_path: Path) -> None:
    made = molora.RECIPES["lora"](r=2, target_modules=[], target_parameters=BOTH)
    made = made.replace(placements=(made.placements[0].replace(bank=kind),))
    base = families.base("mixtral")
    if not BANKS[kind].for_stacked:
        with pytest.raises(ConfigError, match=f"got bank={kind!r} for experts of the base"):
            molora.convert(base, made)
        return
    batch, before = families.inputs("mixtral"), [p.clone() for p in base.parameters()]
    model: Any = tiny.arm(molora.convert(base, made)).eval()
    for bank in banks(model).values():
        if isinstance(bank, BANKS["diagonal"]):
            bank.diagonal.data.normal_(generator=torch.Generator().manual_seed(0))
    expected = tiny.output(model, batch)
    model.save_pretrained(tmp_path / "saved")
    again = molora.load(families.base("mixtral"), tmp_path / "saved").eval()
    assert torch.equal(tiny.output(again, batch), expected)
    model.export_expert(0, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(families.base("mixtral"), tmp_path / "lora").eval()
    close(tiny.output(theirs, batch), expected, "peft_lora")
    merged = model.merge_and_unload()
    close(tiny.output(merged, batch), expected, "same_math_fp32")
    assert any(not torch.equal(a, b) for a, b in zip(before, merged.parameters(), strict=True))


def test_unknown_kinds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted("diagonal")
    model.save_pretrained(tmp_path)
    monkeypatch.delitem(BANKS, "diagonal")
    with pytest.raises(AdapterError, match="bank: got 'diagonal', expected one of plain, frozen_ranks"):
        molora.load(tiny.base_model("llama"), tmp_path)
    with pytest.raises(ConfigError, match="bank: got 'diagonal', expected one of plain, frozen_ranks"):
        molora.convert(tiny.base_model("llama"), model._molora.config)


def test_kinds_that_cannot_take_a_start_back_say_so() -> None:
    with pytest.raises(ConfigError, match=r"bank: got 'diagonal' with a start that is taken back"):
        converted("diagonal", init_lora_weights="pissa")
    with pytest.raises(ConfigError, match="expected one rank for all experts"):
        site("frozen_ranks", ranks=(1, 2, 3))


def test_a_bank_grows_into_one_that_takes_its_start_back() -> None:
    m = next(m for m in converted("plain").modules() if isinstance(m, MixtureLinear))
    assert isinstance(m.bank, ExpertBank)
    A = m.bank.lora_A
    m.take_start_back()
    assert m.site.kind == "frozen_ranks"
    assert isinstance(m.bank, ExpertBank)
    assert m.bank.lora_A is A
    assert m.bank.packed()[2].ranks == (4, 4, 4)


class Own(Bank):
    """A bank without A and B of its own name."""

    dims = {"down": "RI", "up": "OR"}


def test_a_bank_without_a_and_b_has_its_own_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BANKS, "own", Own)
    with pytest.raises(ConfigError, match="'gaussian'.* got bank='own', which has a start of its own"):
        molora.convert(tiny.base_model("llama"), config("own", init_lora_weights="gaussian"))
