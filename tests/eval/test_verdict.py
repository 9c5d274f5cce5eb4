"""The verdict on routings whose answer is known: even, collapsed, two blocks, independent labels."""

from typing import Any

import pytest
import torch

from molora.errors import ConfigError
from molora.eval.ablation.section import ablate
from molora.eval.counting.domains import record_domains
from molora.eval.counting.metrics import dead, effective_experts, entropy, load, max_violation
from molora.eval.counting.specialisation import information
from molora.eval.counting.summary import summary
from molora.eval.verdict import FAILURES, fails, verdict
from tests.support.planted import RULES, dealt

EVEN, COLLAPSED = [1.0, 1, 1, 1], [1.0, 0, 0, 0]


def document(shares_GE: list[list[float]], noise: float = 0.3, documents: int = 30, choices: int = 1) -> dict[str, Any]:
    """``documents`` a domain, each with its own taste around its domain's shares, at two routers of 4 experts."""
    generator = torch.Generator().manual_seed(0)
    group_N = torch.arange(len(shares_GE)).repeat_interleave(documents)
    taste_NME = torch.tensor(shares_GE)[group_N].unsqueeze(1) + noise * torch.rand(
        len(group_N), 2, 4, generator=generator
    )
    counts_NME = (taste_NME.double() * 100).round()
    load_ME = load(counts_NME.sum(0))
    routing = {
        "sites": [{"path": f"layers.{i}", "layer": i, "experts": 4, "choices": choices} for i in range(2)],
        "max_violation": max_violation(load_ME).tolist(),
        "effective_experts": effective_experts(load_ME).tolist(),
        "mean_entropy": entropy(load_ME).clamp(max=0.5).tolist(),
        "dead": [row.nonzero().flatten().tolist() for row in dead(load_ME)],
        "specialisation": information(counts_NME, group_N, 200, 100) if len(shares_GE) > 1 else None,
    }
    return {"name": "run", "routing": routing}


def said(value: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {s.key: (s.level, s.title) for s in verdict(value)}


def test_even_routing_is_balanced_and_not_specialised():
    found = said(document([EVEN, EVEN]))
    assert found["balance"] == ("good", "Balanced")
    assert found["collapse"] == ("good", "Not collapsed")
    assert found["specialised"] == ("warn", "Not specialised")
    assert found["causal"][0] == "unknown"


def test_one_expert_for_everything_is_a_collapse():
    value = document([COLLAPSED, COLLAPSED], noise=0.0)
    assert said(value)["balance"] == ("bad", "Not balanced")
    assert said(value)["collapse"] == ("bad", "Collapsed")
    assert fails(value, "collapsed")
    assert fails(value, "unbalanced")
    assert not fails(document([EVEN, EVEN]), "collapsed")


def test_the_same_two_of_four_experts_are_a_collapse_only_where_two_are_chosen():
    two = [[1.0, 1, 0, 0]] * 2
    assert said(document(two, noise=0.0, choices=2))["collapse"][1] == "Collapsed"
    assert said(document(two, noise=0.0, choices=1))["collapse"][1] == "Not collapsed"
    assert said(document(two, noise=0.0, choices=4))["collapse"][1] == "Not collapsed"  # all used, by weight


def test_domains_with_experts_of_their_own_are_strongly_specialised_and_still_balanced():
    found = said(document([[1.0, 1, 0, 0], [0, 0, 1, 1]], noise=0.1))
    assert found["specialised"] == ("good", "Strongly specialised")
    assert found["balance"][0] == "good"


def test_a_few_documents_are_no_evidence():
    assert said(document([EVEN, EVEN], noise=2.0, documents=3))["specialised"][1] == "Not specialised"


def test_one_domain_says_nothing_about_specialisation():
    value = document([EVEN])
    assert said(value)["specialised"] == ("unknown", "Specialisation unknown")
    with pytest.raises(ConfigError, match="unspecialised: run: cannot be told: Everything is of one domain"):
        fails(value, "unspecialised")


def change(name: str, kind: str, worst: str | None, low: float, **more: Any) -> dict[str, Any]:
    delta = {d: {"value": low + 0.1, "low": low, "high": low + 0.2} for d in ("code", "law")}
    return {"name": name, "kind": kind, "delta": delta, "worst": worst, **more}


def test_routing_matters_where_shuffled_gates_hurt():
    own = [
        change("expert code", "expert", "code", 0.1, site=None, expert=0),
        change("expert law", "expert", "code", 0.1, site=None, expert=1),
        change("favourites of law", "favourites", "law", 0.1, domain="law"),
    ]
    value = document([EVEN, EVEN]) | {"expert_names": ["code", "law"]}
    value["ablation"] = {"interventions": [change("shuffled", "gates", "code", 0.05), *own]}
    statement = verdict(value)[-1]
    assert (statement.level, statement.title) == ("good", "Routing matters")
    assert "rises by 0.150 nats" in statement.text
    assert "in 1 of 1 cases" in statement.text
    assert "1 of 2 experts are named for the domain that suffers most" in statement.text
    assert not fails(value, "without-effect")


def test_routing_does_not_matter_where_the_interval_holds_zero():
    value = {"name": "run", "ablation": {"interventions": [change("shuffled", "gates", None, -0.05)]}}
    assert said(value)["causal"] == ("warn", "Routing does not matter")
    assert fails(value, "without-effect")


def test_every_condition_looks_at_a_statement_that_there_is():
    keys = {s.key for s in verdict({})}
    assert keys == {"balance", "collapse", "specialised", "causal"}
    assert {key for key, _ in FAILURES.values()} == keys
    with pytest.raises(ConfigError, match="got 'colapsed', expected one of collapsed"):
        fails({}, "colapsed")


def test_of_planted_specialists_the_verdict_names_each_for_its_domain(specialists: Any):
    found = planted_document(*specialists)
    assert [s.title for s in verdict(found)] == ["Balanced", "Not collapsed", "Strongly specialised", "Routing matters"]
    text = verdict(found)[-1].text
    assert "Without a domain's favourite experts that domain suffers most in 4 of 4 cases." in text
    assert "4 of 4 experts are named for the domain that suffers most without them." in text


def test_of_the_same_texts_under_dealt_names_the_verdict_says_not_specialised(specialists: Any):
    model, rows = specialists
    found = planted_document(model, dealt(rows))
    assert said(found)["specialised"] == ("warn", "Not specialised")
    assert "0 of 4 experts are named for the domain that suffers most" in verdict(found)[-1].text


def planted_document(model: Any, rows: dict[str, Any]) -> dict[str, Any]:
    documents = {name: [[row] for row in own] for name, own in rows.items()}
    return {
        "name": "planted",
        "routing": summary(record_domains(model, documents, 0), permutations=200, resamples=100),
        "ablation": ablate(model, rows, 0, resamples=100),
        "expert_names": list(RULES),
    }
