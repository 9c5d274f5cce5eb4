"""Routing metrics on hand cases and against slow loops; the summary of a recording."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from molora.errors import ConfigError
from molora.eval.counting.experts import expert_report, intruders, output_similarity, weight_similarity
from molora.eval.counting.metrics import coefficient_of_variation, dead, effective_experts
from molora.eval.counting.specialisation import (
    coactivation,
    divergence,
    information,
    lift,
    saturation,
    transition,
    vocabulary_specialisation,
)
from molora.eval.counting.stats import RoutingStats, SiteInfo, merge
from molora.eval.counting.summary import saturation_of, summary
from tests.support import tiny
from tests.support.recorded import BATCHES, stats_of
from tests.support.traits import traits


def test_balance_of_uniform_and_collapsed() -> None:
    load_ME = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0, 0, 0], [0.5, 0.48, 0.02, 0]])
    assert coefficient_of_variation(load_ME)[:2].tolist() == pytest.approx([0, math.sqrt(3)])
    assert effective_experts(load_ME)[:2].tolist() == pytest.approx([4, 1])
    assert dead(load_ME).tolist() == [[False] * 4, [False, True, True, True], [False, False, True, True]]
    assert effective_experts(torch.zeros(1, 3)).tolist() == [0]


def two_blocks(noise: float = 0.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """40 documents of two domains; the first takes experts 0 and 1, the second 2 and 3, but for a share of noise."""
    group_N = torch.arange(40) % 2
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(40, 1, 4, dtype=torch.float64)
    for n in range(40):
        for _ in range(50):
            lost = torch.rand((), generator=generator) < noise
            e = torch.randint(4 if lost else 2, (), generator=generator) + (0 if lost else 2 * group_N[n])
            counts[n, 0, e] += 1
    return counts, group_N


def test_two_blocks_share_one_bit() -> None:
    found = information(*two_blocks(), permutations=99, resamples=99)
    assert found["nmi"] == pytest.approx(1 / math.sqrt(2), abs=1e-3)  # I = 1 bit, H(domain) = 1, H(expert) = 2
    assert found["p_value"] == pytest.approx(0.01)
    low, high = found["interval"]
    assert low <= found["nmi"] + 1e-3
    assert high - low < 0.01


def test_independent_labels_give_an_interval_at_zero() -> None:
    found = [information(*two_blocks(1.0, seed), permutations=99, resamples=99) for seed in range(10)]
    assert sum(f["interval"][0] == 0 for f in found) >= 9
    assert all(abs(f["above_chance"]) < 0.01 for f in found)
    assert sum(f["p_value"] > 0.05 for f in found) >= 8
    assert all(f["interval"][0] > 0 for f in [information(*two_blocks(0.5, s), 99, 99) for s in range(3)])


def test_lift_is_relative_to_the_mean_of_the_domains() -> None:
    counts, group_N = two_blocks()
    counts[group_N == 0] *= 3  # a long domain weighs no more
    value, low, high = lift(counts, group_N, resamples=50)
    assert value[0, 0, 2:].tolist() == [0, 0]
    assert value[1, 0, 2:].tolist() == pytest.approx([2, 2])
    assert bool(((low <= value + 1e-12) & (value <= high + 1e-12)).all())
    even, low, high = lift(*two_blocks(1.0), resamples=200)
    assert int(((low <= 1) & (high >= 1)).sum()) >= 7
    assert even.sum() == pytest.approx(8, abs=0.1)


def test_divergence_of_alike_and_apart() -> None:
    counts_GME = torch.tensor([[[2.0, 2, 0, 0]], [[8, 8, 0, 0]], [[0, 0, 1, 3]]])
    found = divergence(counts_GME)[0]
    assert found[0, 1] == pytest.approx(0, abs=1e-6)
    assert found[0, 2] == pytest.approx(1, abs=1e-6)
    assert torch.equal(found, found.T)


def test_conditional_shares() -> None:
    together = torch.tensor([[4.0, 1, 3], [1, 2, 1], [3, 1, 4]])
    assert coactivation(together)[0].tolist() == [1, 0.25, 0.75]
    assert coactivation(together)[1].tolist() == [0.5, 1, 0.5]
    assert transition(torch.tensor([[1.0, 3], [0, 0]])).tolist() == [[0.25, 0.75], [0, 0]]


def test_vocabulary_by_hand() -> None:
    counts_VE = torch.tensor([[12, 0], [5, 15], [1, 8], [10, 10]])
    found = vocabulary_specialisation(counts_VE)
    assert found["ids"] == 3  # the third was seen nine times
    assert found["share"] == pytest.approx((1 + 0.75 + 0.5) / 3)
    assert found["words"] == [[(0, 1.0, 12), (3, 0.5, 20)], [(1, 0.75, 20)]]
    assert vocabulary_specialisation(torch.zeros(3, 2))["share"] is None


def test_saturation_by_hand() -> None:
    late = torch.tensor([[0, 1], [2, 3], [1, -1], [-1, -1]])
    early = torch.tensor([[1, 0], [2, 0], [3, -1], [0, 1]])
    assert saturation(early, late) == pytest.approx((1 + 0.5 + 0) / 3)
    assert saturation(late, late) == 1


RANKS, SCALES = (2, 3, 0, 2), (1.0, 0.5, 1.0, -2.0)


def bank(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(7, 6, generator=g), torch.randn(5, 7, generator=g)
    A[5:], B[:, 5:] = A[:2], B[:, :2]  # the last is the first, turned round
    return A, B


def test_similarity_is_that_of_the_whole_matrices() -> None:
    A, B = bank()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))
    cosine, cka = weight_similarity(A, B, RANKS, SCALES), output_similarity(x, A, B, RANKS)
    starts = [0, 2, 5, 5, 7]
    deltas = [SCALES[e] * (B[:, a:b] @ A[a:b]).double() for e, (a, b) in enumerate(pairwise(starts))]
    for e, f in [(0, 1), (0, 3), (1, 3), (1, 1)]:
        slow = (deltas[e] * deltas[f]).sum() / deltas[e].norm() / deltas[f].norm()
        assert cosine[e, f] == pytest.approx(slow.item(), abs=1e-6)
        ys = [(x.double() - x.double().mean(0)) @ deltas[i].T for i in (e, f)]
        slow_cka = (ys[0].T @ ys[1]).norm() ** 2 / ((ys[0].T @ ys[0]).norm() * (ys[1].T @ ys[1]).norm())
        assert cka[e, f] == pytest.approx(slow_cka.item(), abs=1e-6)
    assert cosine[0, 3] == pytest.approx(-1)
    assert cka[0, 3] == pytest.approx(1)
    assert cosine[2].tolist() == cka[2].tolist() == [0, 0, 0, 0]


def test_a_new_direction_is_an_intruder() -> None:
    W = torch.diag(torch.tensor([5.0, 4, 3, 2, 0, 0]))[:, :4]
    new, known = torch.zeros(6, 4), torch.zeros(6, 4)
    new[4, 3], known[0, 0] = 9.0, 9.0
    assert intruders(W, torch.zeros_like(W), first=3) == 0
    assert intruders(W, known, first=3) == 0
    assert intruders(W, new, first=3) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_report_of_a_models_experts(name: str, tmp_path: Path) -> None:
    model = tiny.converted("mixlora", name, tmp_path)
    found = expert_report(model, first=4)
    assert found
    for site in found.values():
        assert [site["cosine"][e][e] for e in range(4)] == pytest.approx([1] * 4)
        assert len(site["intruders"]) == 4
        assert all(0 <= n <= 4 for n in site["intruders"])
    with pytest.raises(ConfigError, match=r"convert\(\)"):
        expert_report(tiny.base_model(name))


@pytest.mark.parametrize("recipe", ["mixlora", "mola", "xlora"])
def test_the_summary_says_what_was_counted_in_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    model = tiny.converted(recipe, "llama", tmp_path)
    stats, again = (stats_of(model, BATCHES, seed=2) for _ in range(2))
    said = summary(stats, 5, 50, 50)
    assert json.dumps(said) == json.dumps(summary(again, 5, 50, 50))
    merged = merge(stats_of(model, BATCHES[3:], seed=2), stats_of(model, BATCHES[:3], seed=2))
    assert json.dumps(said) == json.dumps(summary(merged, 5, 50, 50))
    assert said["domains"] == {"a": {"documents": 9}, "b": {"documents": 6}, "c": {"documents": 3}}
    assert {s["path"] for s in said["sites"]} == {s.path for s in stats.sites}
    assert {s["stream"] for s in said["sites"]} == set(said["samples"][0]["tokens"])
    for i, site in enumerate(stats.sites):
        assert len(said["load_of_all"][i]) == len(said["lift"]["c"]["value"][i]) == site.experts
        assert sum(said["load"]["b"][i]) == pytest.approx(1, abs=1e-4)
        assert sum(said["importance"][i]) == pytest.approx(1, abs=1e-4)
        assert said["tokens"][i] == 6 * 24
        assert 0 < said["mean_entropy"][i] <= said["entropy_of_mean"][i] + 1e-6 <= 1 + 2e-6
        assert (said["coactivation"][i] is None) == (not traits(recipe).picks)
    assert len(said["samples"]) == 8 + 6 + 3
    assert len(said["samples"][0]["sites"]) == len(stats.sites)


def test_saturation_of_a_checkpoint_with_itself_and_another(tmp_path: Path) -> None:
    model = tiny.converted("mixlora", "llama", tmp_path)
    early = stats_of(model, BATCHES)
    assert saturation_of(early, early) == [1.0] * len(early.sites)
    late = stats_of(tiny.arm(model, seed=9), BATCHES)
    assert all(share is not None and 0 < share < 1 for share in saturation_of(early, late))
    with pytest.raises(ConfigError, match="documents in common"):
        saturation_of(early, stats_of(model, [("z", 0)]))


def test_collapse_and_indecision_are_told_apart() -> None:
    site = SiteInfo("layers.0.q", 0, 4, 1, False, "attention_mask")
    names = {"collapsed": ([100.0, 0, 0, 0], 0.0), "undecided": ([25.0, 25, 25, 25], 100 * math.log(4))}
    for name, (importance, entropy) in names.items():
        stats = RoutingStats((site,))
        s = stats.site(0)
        s["picks"].copy_(torch.tensor(importance))
        s["importance"].copy_(torch.tensor(importance))
        s["entropy"].fill_(entropy)
        s["tokens"].fill_(100)
        stats.add_unit("a", 1, torch.tensor(importance))
        said = summary(stats)
        assert said["entropy_of_mean"] == pytest.approx([0.0 if name == "collapsed" else 1.0])
        assert said["mean_entropy"] == pytest.approx([0.0 if name == "collapsed" else 1.0])
        assert said["dead"] == ([[1, 2, 3]] if name == "collapsed" else [[]])
        assert said["specialisation"] is None


def test_nothing_recorded_says_so() -> None:
    with pytest.raises(ConfigError, match="nothing was recorded"):
        summary(RoutingStats(()))
