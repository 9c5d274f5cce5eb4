"""Streaming counts of routing against slow loops over the exact tape, for every recipe and kind of model."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

import molora
from molora.errors import ConfigError
from molora.eval.counting.watch import collect_routing
from tests.support import tiny
from tests.support.recorded import agree, padded, slow_counts
from tests.support.traits import having


@pytest.mark.parametrize("recipe", having(lambda t: t.routes))
def test_counts_are_those_of_a_loop_over_the_tape(recipe: str, tmp_path: Path) -> None:
    model, inputs = tiny.converted(recipe, "llama", tmp_path), padded("llama")
    before = tiny.output(model, inputs)
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    with collect_routing(model) as stats, stats.batch(["a", "b", "a"]):
        during = tiny.output(model, inputs)
    assert torch.equal(before, during)
    assert stats.domains() == ["a", "b"]
    assert len(stats.units) == 3
    assert stats.sites
    agree(stats, tape)


def test_plain_lora_has_no_routers_to_count(tmp_path: Path) -> None:
    model = tiny.converted("lora", "llama", tmp_path)
    with collect_routing(model) as stats:
        tiny.output(model, tiny.batch("llama"))
    assert stats.sites == ()
    assert stats.units == {}


@pytest.mark.parametrize("name", ["t5", "whisper", "vit", "bert", "clip"])
def test_models_of_other_kinds(name: str, tmp_path: Path) -> None:
    model, inputs = tiny.converted("mola", name, tmp_path), padded(name, rows=2)
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    with collect_routing(model) as stats, stats.batch(["x", "y"]):
        tiny.output(model, inputs)
    agree(stats, tape)
    counts, group_N = stats.documents()
    assert group_N.tolist() == [0, 1]
    for i in range(len(stats.sites)):
        assert (counts[:, stats.columns(i)].sum(1) > 0).all()


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_belongs_to_its_prompts(recipe: str, beams: int, tmp_path: Path) -> None:
    model = tiny.converted(recipe, "llama", tmp_path)
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    fixed = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": beams}
    plain = model.generate(**inputs, **fixed)
    with molora.record_routing(model) as tape:
        model.generate(**inputs, **fixed)
    with collect_routing(model) as stats, stats.batch(["short", "long"]):
        assert torch.equal(plain, model.generate(**inputs, **fixed))
    agree(stats, tape)
    tokens = int(stats.site(0)["tokens"])
    assert tokens == beams * (3 + 5 + 2 * 3)  # the last new token is never an input
    assert len(stats.units) == 2
    if beams == 1:
        sample = next(s for s in stats.samples.values() if s.domain == "short")
        assert sample.tokens["attention_mask"] == [*ids[0, 2:].tolist(), *plain[0, 5:8].tolist()]


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_generation_with_an_encoder(name: str, tmp_path: Path) -> None:
    model, inputs = tiny.converted("mola", name, tmp_path), padded(name, rows=2)
    given = {k: v for k, v in inputs.items() if k != "labels"}
    plain = model.generate(**given, max_new_tokens=4, do_sample=False)
    with collect_routing(model) as stats, stats.batch(["x", "y"]):
        assert torch.equal(plain, model.generate(**given, max_new_tokens=4, do_sample=False))
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    counts, group_N = stats.documents()
    assert group_N.tolist() == [0, 1]
    for i, site in enumerate(stats.sites):
        assert (counts[:, stats.columns(i)].sum(1) > 0).all()
        if "encoder." in site.path.split("decoder")[0] and site.path in tape:
            assert torch.equal(stats.site(i)["picks"], slow_counts(tape, site.path, site.experts)["picks"])


def test_transitions_and_vocabulary_are_those_of_a_loop(tmp_path: Path) -> None:
    model, inputs = tiny.converted("mixlora", "llama", tmp_path), padded("llama")
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    with collect_routing(model) as stats:
        tiny.output(model, inputs)
    tops = [tape[s.path][0].probs.argmax(-1) for s in stats.sites]
    valid, ids = tape[stats.sites[0].path][0].valid, inputs["input_ids"].reshape(-1)
    (a, b), wanted = stats.pairs[0], torch.zeros(4, 4).double()
    words = torch.zeros(64, 4, dtype=torch.int32)
    for t in valid.nonzero().flatten().tolist():
        wanted[tops[a][t], tops[b][t]] += 1
        words[ids[t], tops[a][t]] += 1
    assert torch.equal(stats.transitions[0], wanted)
    assert torch.equal(stats.vocabulary[a], words)


def test_samples_hold_the_tapes_choices(tmp_path: Path) -> None:
    model, inputs = tiny.converted("mixlora", "llama", tmp_path), padded("llama")
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    with collect_routing(model, sample_tokens=5) as stats, stats.batch("d", documents=["x", "y", "z"]):
        tiny.output(model, inputs)
    assert len(stats.samples) == 3
    rows = {tuple(row[:5].tolist()): b for b, row in enumerate(inputs["input_ids"])}
    for sample in stats.samples.values():
        b = rows[tuple(sample.tokens["attention_mask"])]
        ((sites, ids, weights),) = sample.picks
        for m, i in enumerate(sites):
            record = tape[stats.sites[i].path][0]
            assert record.ids is not None
            assert torch.equal(ids[m].long(), record.ids.view(3, 9, -1)[b, :5])
            assert torch.equal(weights[m], record.weights.view(3, 9, -1)[b, :5].half())


def test_equal_probabilities_are_near_ties(tmp_path: Path) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "router" in name:
                p.zero_()
    with collect_routing(model) as stats:
        tiny.output(model, padded("llama"))
    assert stats.site(0)["ties"] == stats.site(0)["tokens"] == 24
    assert stats.site(0)["entropy"] / 24 == pytest.approx(torch.tensor(4.0).log().item(), abs=1e-5)
    assert stats.site(0)["batch_violation"] == 1  # all to the first two of four
    assert stats.site(0)["batches"] == 1


def test_a_failed_forward_and_other_threads_leave_nothing(tmp_path: Path) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    with collect_routing(model) as stats:
        handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), stats.batch("a"):
            tiny.output(model, padded("llama"))
        handle.remove()
        thread = threading.Thread(target=tiny.output, args=(model, padded("llama")))
        thread.start()
        thread.join()
        with model.disable_adapter():
            tiny.output(model, padded("llama"))
        assert stats.units == {}
        with pytest.raises(ConfigError, match="2 documents for 3 rows"), stats.batch("a", documents=[1, 2]):
            tiny.output(model, padded("llama"))
    tiny.output(model, padded("llama"))
    assert stats.units == {}
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


def test_a_compiled_model_is_counted_as_the_plain_one(tmp_path: Path) -> None:
    model, inputs = tiny.converted("mixlora", "llama", tmp_path), padded("llama")
    compiled = torch.compile(model, backend="eager", dynamic=False)
    tiny.output(compiled, inputs)
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    with collect_routing(model) as stats, stats.batch("a"):
        tiny.output(compiled, inputs)
    agree(stats, tape)


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"convert\(\)"), collect_routing(tiny.base_model("llama")):
        pass
