"""Metrics of routing on counts whose answer is known, and pictures of them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from molora.errors import ConfigError
from molora.eval.counting.metrics import (
    assignment_counts,
    entropy,
    load,
    max_violation,
    mutual_information,
    permutation_p_value,
)
from molora.eval.page.figures import load_heatmaps, need_matplotlib, site_labels


def test_assignments_leave_out_padding_and_empty_slots() -> None:
    ids_TK = torch.tensor([[0, 1], [1, -1], [2, 0], [2, 2]])
    valid_T = torch.tensor([True, True, True, False])
    counts = assignment_counts(torch.ones(4, 2), ids_TK, valid_T, 3, rows=2)
    assert counts.tolist() == [[1, 2, 0], [1, 0, 1]]
    dense = assignment_counts(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), None, None, 2, rows=1)
    assert dense.tolist() == [[1.25, 0.75]]


def test_balance_at_its_ends() -> None:
    counts = torch.tensor([[5.0, 5, 5, 5], [20, 0, 0, 0], [7, 7, 0, 0]])
    torch.testing.assert_close(max_violation(load(counts)), torch.tensor([0.0, 3, 1]))
    torch.testing.assert_close(entropy(load(counts)), torch.tensor([1.0, 0, 0.5]))
    assert load(torch.zeros(1, 3)).tolist() == [[0, 0, 0]]


def test_information_at_its_ends_and_in_between() -> None:
    independent = torch.tensor([[4.0, 8], [2, 4]]).unsqueeze(1)
    determined = torch.tensor([[9.0, 0], [0, 9]]).unsqueeze(1)
    one_expert = torch.tensor([[9.0, 0], [9, 0]]).unsqueeze(1)
    joint = torch.tensor([[3.0, 1], [1, 3]]).unsqueeze(1)
    bits = 2 - (-2 * (3 / 8) * math.log2(3 / 8) - 2 * (1 / 8) * math.log2(1 / 8))
    for counts, expected in ((independent, 0), (determined, 1), (one_expert, 0), (joint, bits)):
        assert mutual_information(counts).item() == pytest.approx(expected, abs=1e-12)
    both = torch.cat([independent, determined], 1)
    assert mutual_information(both).tolist() == pytest.approx([0, 1], abs=1e-12)


def documents(lift: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """60 documents of 3 groups over 2 sites and 4 experts; each document has its own taste, each group ``lift``."""
    generator = torch.Generator().manual_seed(seed)
    group_N = torch.arange(60) % 3
    taste_NME = torch.rand(60, 2, 4, generator=generator) * 5
    taste_NME[torch.arange(60), :, group_N] += lift
    return (taste_NME * 20).round(), group_N


def test_permutations_find_what_is_there() -> None:
    found = permutation_p_value(*documents(3.0), permutations=200)
    assert found["p_value"] == pytest.approx(1 / 201)
    assert found["nmi"] > 2 * found["chance"]
    assert found == permutation_p_value(*documents(3.0), permutations=200)


def test_permutations_of_documents_do_not_find_what_is_not_there() -> None:
    values = [permutation_p_value(*documents(0.0, seed), permutations=99)["p_value"] for seed in range(20)]
    assert sum(p <= 0.05 for p in values) <= 3
    assert max(values) > 0.5


def test_labels_of_sites() -> None:
    assert site_labels(["model.layers.0.mlp.up", "model.layers.11.mlp.up"]) == ["0", "11"]
    assert site_labels(["h.0.q", "h.0.k"]) == ["0 q", "0 k"]
    assert site_labels(["encoder.proj"]) == ["proj"]


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_draws_unequal_sites_and_empty_experts(tmp_path: Path, suffix: str) -> None:
    shares = {"one": [[0.5, 0.5, 0], [0.0, 0.9, 0.1]], "two": [[1.0, 0, 0], [0.3, 0.3, 0.4]]}
    path = tmp_path / "new" / f"p.{suffix}"
    load_heatmaps(shares, ["layers.0", "layers.1"], [2, 3], "title", path)
    assert path.stat().st_size > 5000


def test_a_missing_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'molora\[eval\]'"):
        need_matplotlib()
