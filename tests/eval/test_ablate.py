"""Ablation finds what was planted, and says nothing where nothing was; it leaves the model alone and can be resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.data.examples import Example
from molora.errors import ConfigError, MoloraError
from molora.eval.ablation.section import ablate, purposes
from molora.eval.counting.summary import summary
from molora.eval.counting.tape import record_routing
from molora.eval.counting.watch import collect_routing
from molora.eval.ledger import Ledger
from molora.eval.scoring.losses import batches, heldout_loss
from tests.support import behaviours, tiny
from tests.support.planted import RULES, dealt
from tests.support.tolerances import close

Planted = tuple[Any, dict[str, list[Example]]]
GATES = ["off", "uniform", "shuffled", "random", "top-1", "frozen"]


def texts(low: int, high: int, count: int, seed: int = 0) -> list[Example]:
    """Random tokens of unequal length; the first two have no label."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 12, (count,), generator=g).tolist()
    ids = [torch.randint(low, high, (n,), generator=g).tolist() for n in lengths]
    return [Example(input_ids=i, labels=[-100, -100, *i[2:]]) for i in ids]


DATA = {"low": texts(3, 30, 5), "high": texts(30, 64, 7)}


@pytest.fixture(scope="module")
def found(specialists: Planted) -> dict[str, Any]:
    return ablate(*specialists, 0)


@pytest.fixture(scope="module")
def control(specialists: Planted) -> dict[str, Any]:
    model, rows = specialists
    return ablate(model, dealt(rows), 0)


def by_name(section: dict[str, Any]) -> dict[str, Any]:
    return {i["name"]: i for i in section["interventions"]}


def test_without_its_expert_a_domain_is_lost_and_no_other(found: dict[str, Any]) -> None:
    for name in RULES:
        for lesion in (by_name(found)[f"expert {name}"], by_name(found)[f"favourites of {name}"]):
            assert lesion["worst"] == name
            assert lesion["delta"][name]["low"] > 1
            assert all(d["high"] < 0.5 for other, d in lesion["delta"].items() if other != name)


def test_what_each_expert_is_for(found: dict[str, Any], control: dict[str, Any]) -> None:
    table = purposes(found)
    assert [(p.name, p.domain) for p in table[:4]] == [(f"expert {name}", name) for name in RULES]
    assert [p.domain for p in table[4:]] == list(RULES)
    assert all(p.apart for p in table)
    assert table[0].delta == by_name(found)["expert up"]["delta"]["up"]
    assert not any(p.apart for p in purposes(control)), "names that say nothing are not told apart"


def test_gates_matter_where_experts_are_specialists(found: dict[str, Any]) -> None:
    assert list(by_name(found))[:6] == GATES
    for name in ("off", "uniform", "shuffled", "random", "frozen"):
        assert all(d["low"] > 0.5 for d in by_name(found)[name]["delta"].values()), name
    assert by_name(found)["top-1"]["worst"] is None, "one expert a token is what it has"
    assert all(d == {"value": 0, "low": 0, "high": 0} for d in by_name(found)["top-1"]["delta"].values())


@pytest.mark.parametrize("names", ["true", "dealt out"])
def test_routing_tells_the_domains_apart_if_the_names_are_true(specialists: Planted, names: str) -> None:
    model, rows = specialists
    with torch.no_grad(), collect_routing(model) as stats:
        for domain, own in (rows if names == "true" else dealt(rows)).items():
            for _, batch in batches(own, 0, 8):
                with stats.batch(domain):
                    model(**{k: v for k, v in batch.items() if k != "labels"})
    said = summary(stats, permutations=99, resamples=99)["specialisation"]
    if names == "true":
        assert said["interval"][0] > 0.6
        assert said["p_value"] == 0.01
    else:
        assert said["interval"] == [0, 0]
        assert said["p_value"] > 0.5


def test_losses_are_those_of_the_held_out_score(specialists: Planted, found: dict[str, Any]) -> None:
    model, rows = specialists
    with model.disable_adapter():
        off = {name: heldout_loss(model, own, 0) for name, own in rows.items()}
    for name, own in rows.items():
        loss = found["loss"][name]
        assert loss["value"] == pytest.approx(heldout_loss(model, own, 0), abs=1e-5)
        assert loss["low"] < loss["value"] < loss["high"]
        delta = by_name(found)["off"]["delta"][name]["value"]
        assert delta == pytest.approx(off[name] - loss["value"], abs=1e-5)
    assert found["documents"] == dict.fromkeys(RULES, 12)
    assert found["tokens"] == {name: sum(len(r["labels"]) - 1 for r in own) for name, own in rows.items()}


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_the_model_stays_and_the_same_seed_gives_the_same_bytes(recipe: str) -> None:
    model, inputs = behaviours.armed(recipe, "llama"), tiny.batch("llama")
    before, bits = tiny.output(model, inputs), behaviours.digest(model.state_dict())
    first, again, other = (ablate(model, DATA, 0, resamples=50, seed=s) for s in (0, 0, 1))
    assert json.dumps(first) == json.dumps(again)
    values = [[i["delta"]["low"]["value"] for i in section["interventions"]] for section in (first, other)]
    same = [name for name, a, b in zip(by_name(first), *values, strict=True) if a == b]
    assert same == [name for name in by_name(first) if name not in ("shuffled", "random")], "what is drawn changes"
    assert torch.equal(tiny.output(model, inputs), before)
    assert behaviours.digest(model.state_dict()) == bits
    assert behaviours.snapshot(model)["hooks"] == behaviours.snapshot(behaviours.armed(recipe, "llama"))["hooks"]


def test_dropout_is_off() -> None:
    model = behaviours.armed("mola", "llama", lora_dropout=0.5)
    assert ablate(model.train(), DATA, 0, resamples=5) == ablate(model.eval(), DATA, 0, resamples=5)


def test_the_worst_domain_is_certainly_hurt(found: dict[str, Any], control: dict[str, Any]) -> None:
    """Of the domains with the whole interval above 0, the one of the largest delta; the control has all cases."""
    seen = set()
    for i in (*found["interventions"], *control["interventions"]):
        hurt = {name: d["value"] for name, d in i["delta"].items() if d["low"] > 0}
        assert i["worst"] == (max(hurt, key=lambda name: hurt[name]) if hurt else None)
        seen.add((bool(hurt), any(d["value"] > 0 >= d["low"] for d in i["delta"].values())))
    assert {(True, True), (True, False), (False, False)} <= seen


@pytest.mark.parametrize("recipe", ["mola", "xlora", "smora"])
def test_gates_and_counts_are_those_of_each_text_alone(recipe: str, tmp_path: Path) -> None:
    """The mean gates that ``frozen`` uses, and the counts behind favourites: without the padding of batches."""
    model, path = behaviours.armed(recipe, "llama"), tmp_path / "progress.jsonl"
    ablate(model, DATA, 0, resamples=5, each="none", ledger=Ledger(path))
    plain = Ledger(path).piece("ablation: as trained", lambda: {})
    tapes = {}
    for domain, own in DATA.items():
        with record_routing(model) as tapes[domain]:
            for row in own:
                tiny.output(model, {"input_ids": torch.tensor([row["input_ids"]])})
    for site, mean in plain["means"].items():
        all_TE = torch.cat([r.dense() for tape in tapes.values() for r in tape[site]])
        close(torch.tensor(mean), all_TE.mean(0), "same_math_fp32")
        for domain, tape in tapes.items():
            counts = sum(r.slots().sum((0, 1)) if r.ids is not None else r.weights.sum(0) for r in tape[site])
            close(torch.tensor(plain["picks"][site][domain]), torch.as_tensor(counts), "same_math_fp32")


def test_a_run_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    model, wanted = behaviours.armed("mola", "llama"), ablate(behaviours.armed("mola", "llama"), DATA, 0, resamples=50)
    before, path, runs = tiny.output(model, tiny.batch("llama")), tmp_path / "progress.jsonl", []

    def breaks(*_: Any) -> None:
        runs.append(1)
        if len(runs) == 7:  # in the second batch of the fourth pass, while the gates are edited
            raise KeyboardInterrupt

    handle = model.lm_head.register_forward_pre_hook(breaks)
    with pytest.raises(KeyboardInterrupt):
        ablate(model, DATA, 0, resamples=50, ledger=Ledger(path))
    assert torch.equal(tiny.output(model, tiny.batch("llama")), before), "the edit went with the error"
    kept = len(path.read_text().splitlines()) - 1  # the first line names the job
    assert kept == 3
    runs[:] = [1] * 7
    found = ablate(model, DATA, 0, resamples=50, ledger=Ledger(path))
    handle.remove()
    assert json.dumps(found) == json.dumps(wanted)
    assert len(runs) - 7 == 2 * (1 + len(wanted["interventions"]) - kept), "what was done is not done again"


def test_single_experts_by_router_or_by_name() -> None:
    mixed, named = behaviours.armed("mixlora", "llama"), behaviours.armed("meteora", "llama")
    kinds = {
        each: [i["kind"] for i in ablate(mixed, DATA, 0, resamples=5, each=each)["interventions"]][6:]
        for each in ("none", "favourite", "expert", "auto")
    }
    experts, pairs = ["expert"] * 8, ["favourites"] * 2
    assert kinds == {"none": [], "favourite": pairs, "expert": experts, "auto": experts + pairs}
    single = [i for i in ablate(mixed, DATA, 0, resamples=5)["interventions"] if i["kind"] == "expert"]
    assert [(i["name"], i["site"], i["expert"]) for i in single[3:5]] == [
        ("layer 0 expert 3", 0, 3),
        ("layer 1 expert 0", 1, 0),
    ]
    many = ablate(behaviours.armed("smora", "llama"), DATA, 0, resamples=5)["interventions"][6:]
    assert [i["domain"] for i in many] == ["low", "high"], "224 ranks would take too long"
    alone = ablate(named, {"low": DATA["low"]}, 0, resamples=5)["interventions"][6:]
    assert [(i["name"], i["site"], i["expert"]) for i in alone] == [
        ("expert 0", None, 0),
        ("expert lora_1", None, 1),
        ("expert math", None, 2),
    ]
    given = ablate(named, DATA, 0, resamples=5, each="expert", expert_names="xyz")["interventions"]
    assert [i["name"] for i in given[6:]] == ["expert x", "expert y", "expert z"]


def test_what_cannot_be_ablated_is_refused() -> None:
    model = behaviours.armed("mola", "llama")
    packed = {"a": [Example(input_ids=[3, 4], labels=[3, 4], position_ids=[0, 1])]}
    for faulty, more, message in (
        (tiny.base_model("llama"), {}, r"convert\(\)"),
        (behaviours.armed("lora", "llama"), {}, "no router with a choice"),
        (model, {"rows": {}}, "any domain"),
        (model, {"rows": {**DATA, "c": []}}, "domain c"),
        (model, {"rows": {"a": [Example(input_ids=[3, 4], labels=[3, -100])]}}, "no document with a label"),
        (model, {"rows": packed}, "packed"),
        (model, {"each": "experts"}, "did you mean 'expert'"),
        (model, {"each": "favourite", "rows": {"low": DATA["low"]}}, "two or more"),
        (model, {"expert_names": ["a", "b"]}, "got 2 names, but .*layers.1.* has 6 experts"),
        (model, {"resamples": 0}, "resamples: got 0"),
        (model, {"size": 0}, "size: got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            ablate(faulty, more.pop("rows", DATA), 0, **more)
    with torch.no_grad():
        model.lm_head.weight.mul_(float("inf"))
    with pytest.raises(MoloraError, match="as trained.*not finite"):
        ablate(model, DATA, 0)
