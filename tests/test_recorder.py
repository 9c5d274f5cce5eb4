"""Streaming counts of routing against slow loops over the exact tape, for every recipe and kind of model."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import molora
from molora.errors import ConfigError
from molora.eval.record import RoutingTape
from molora.eval.recorder import RoutingRecorder
from molora.eval.stats import RoutingStats, merge
from molora.eval.watch import collect_routing
from tests import tiny

RECIPES = ("mixlora", "mola", "smora", "llava_mole", "xlora", "meteora")


def padded(name: str, rows: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """A batch whose second row ends in padding."""
    inputs = tiny.batch(name, rows=rows, seed=seed)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].clone()
        inputs["attention_mask"][1, -3:] = 0
    return inputs


def slow_counts(tape: RoutingTape, site: str, experts: int) -> dict[str, Any]:
    """Picks, co-activation, tokens and repeats of one site, token by token."""
    picks, together = torch.zeros(experts).double(), torch.zeros(experts, experts).double()
    tokens = repeats = 0
    for r in tape[site]:
        before = None
        for t in range(len(r.weights)):
            if t % (len(r.weights) // r.rows) == 0:
                before = None
            if not r.valid[t]:
                before = None
                continue
            tokens += 1
            if r.ids is None:
                picks += r.weights[t].abs().double()
                top = int(r.weights[t].abs().argmax())
            else:
                chosen = [int(e) for e in r.ids[t] if e >= 0]
                for a in chosen:
                    picks[a] += 1
                    for b in chosen:
                        together[a, b] += 1
                top = max(chosen, key=lambda e: (float(r.probs[t, e]), -e)) if chosen else -1
            repeats += before is not None and top >= 0 and before == top
            before = top if top >= 0 else None
    return {"picks": picks, "together": together, "tokens": tokens, "repeats": repeats}


def agree(stats: RoutingStats, tape: RoutingTape) -> None:
    recorded = [s for s, records in tape.items() if records[0].num_experts > 1]
    assert sorted(recorded) == sorted(s.path for s in stats.sites)
    for i, site in enumerate(stats.sites):
        slow, fast = slow_counts(tape, site.path, site.experts), stats.site(i)
        torch.testing.assert_close(fast["picks"], slow["picks"], atol=1e-4, rtol=1e-5)
        assert torch.equal(fast["together"], slow["together"])
        assert (int(fast["tokens"]), int(fast["repeats"])) == (slow["tokens"], slow["repeats"])
        by_document, _ = stats.documents()
        torch.testing.assert_close(by_document[:, stats.columns(i)].sum(0), fast["picks"])


@pytest.mark.parametrize("recipe", RECIPES)
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


def stats_of(model: Any, batches: list[tuple[str, int]], **options: Any) -> RoutingRecorder:
    with collect_routing(model, **options) as stats:
        for domain, seed in batches:
            with stats.batch(domain):
                tiny.output(model, padded("llama", seed=seed))
    return stats


def same(a: RoutingStats, b: RoutingStats) -> None:
    (tensors_a, meta_a), (tensors_b, meta_b) = a.state(), b.state()
    assert json.dumps(meta_a) == json.dumps(meta_b)
    assert save(tensors_a) == save(tensors_b)


BATCHES = [("a", 0), ("b", 1), ("a", 2), ("b", 3), ("c", 4), ("a", 5)]


@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_merged_shards_are_the_whole_bit_by_bit(recipe: str, tmp_path: Path) -> None:
    model = tiny.converted(recipe, "llama", tmp_path)
    options = {"samples": 2, "seed": 3}
    whole = stats_of(model, BATCHES, **options)
    first, second = stats_of(model, BATCHES[:2], **options), stats_of(model, BATCHES[2:], **options)
    same(merge(first, second), whole)
    same(merge(second, first), whole)
    same(stats_of(model, BATCHES[::-1], **options), whole)


def test_documents_beyond_the_limit_are_pooled_alike_in_any_order(tmp_path: Path) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    parts = [stats_of(model, own) for own in (BATCHES[:3], BATCHES[3:])]
    whole = stats_of(model, BATCHES)
    total = whole.documents()[0].sum(0)
    pooled = []
    for batches in (BATCHES, BATCHES[::-1]):
        with collect_routing(model) as stats:
            stats.most_units = 7
            for domain, seed in batches:
                with stats.batch(domain):
                    tiny.output(model, padded("llama", seed=seed))
        pooled.append(stats)
    assert len(whole.units) == 18 > len(pooled[0].units)
    same(*pooled)
    assert torch.equal(pooled[0].documents()[0].sum(0), total)
    same(merge(*parts), whole)


def test_a_state_survives_files(tmp_path: Path) -> None:
    stats = stats_of(tiny.converted("meteora", "llama", tmp_path), BATCHES)
    tensors, meta = stats.state()
    same(RoutingStats.from_state(load(save(tensors)), json.loads(json.dumps(meta))), stats)
    with pytest.raises(ConfigError, match="schema"):
        RoutingStats.from_state(tensors, {**meta, "schema": 99})


def test_unlike_recordings_do_not_merge(tmp_path: Path) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    with pytest.raises(ConfigError, match="differ in seed"):
        merge(stats_of(model, BATCHES[:1], seed=0), stats_of(model, BATCHES[:1], seed=1))


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


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"convert\(\)"), collect_routing(tiny.base_model("llama")):
        pass
