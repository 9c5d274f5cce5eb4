"""One expert more, or some less, in a trained mixture: the others keep their bits, and what follows of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.config import Placement
from molora.errors import ConfigError
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import HEAD
from molora.routers import ROUTERS, LinearRouter
from molora.surgery.install import sites_of
from tests.support import behaviours, tiny
from tests.support.tolerances import close
from tests.support.traits import changed, having, traits

GROWING = having(lambda t: t.grows)
PRUNED = having(lambda t: t.routes)
# Their weights are renormalised over the chosen, so that an expert nobody chooses changes them by rounding only.
RENORMALISED = having(lambda t: t.grows and t.renormalises)


def experts(model: Any) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """A, B and scale of every expert, by site."""
    return {
        path: [tuple(torch.as_tensor(t).detach().clone() for t in m.bank.expert(e)) for e in range(m.site.num_experts)]
        for path, m in sites_of(model).values()
        if isinstance(m, MixtureLinear) and m.bank is not None
    }


def routers(model: Any) -> dict[str, torch.Tensor]:
    """The routers' weights, by site; of a model-wide one (sites, experts, size)."""
    found = {path: m.router for path, m in sites_of(model).values()}
    out = {path: router.weight.detach().clone() for path, router in found.items() if hasattr(router, "weight")}
    if getattr(model, HEAD, None) is not None:
        head = getattr(model, HEAD)
        out[HEAD] = head.layers[-1].weight.detach().clone().unflatten(0, (-1, head.num_experts)).transpose(0, 1)
    return out


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def reloaded(model: Any, name: str, folder: Path) -> Any:
    model.save_pretrained(folder)
    return molora.load(tiny.base_model(name), folder, trainable=True).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("recipe", GROWING)
def test_a_new_expert_leaves_the_others_bit_for_bit(recipe: str, name: str, tmp_path: Path) -> None:
    model, inputs = behaviours.armed(recipe, name), tiny.batch(name)
    before, rows, output = experts(model), routers(model), tiny.output(model, inputs)
    counts = {p: m.site.num_experts for p, m in sites_of(model).values()}
    more = {} if traits(recipe).picks else {"logit": -14.0}  # a dense router gives it a share on every linear
    model.add_expert(seed=4, **more)
    after = experts(model)
    for path, m in sites_of(model).values():
        routed = ROUTERS[m.placement.router.kind].chooses
        assert m.site.num_experts == counts[path] + routed
        if path in before:
            assert all(same(a, b) for a, b in zip(after[path], before[path], strict=False))
            assert not routed or (after[path][-1][0].any() and not after[path][-1][1].any())
        if path in rows and routed:
            assert torch.equal(m.router.weight[:-1], rows[path])
    if recipe in RENORMALISED:
        close(tiny.output(model, inputs), output, "same_math_fp32")
    else:  # its probability of e**-10 beside the others' is lost to them
        close(tiny.output(model, inputs), output, "a_vanishing_expert")
    again = reloaded(model, name, tmp_path)
    assert torch.equal(tiny.output(again, inputs), tiny.output(model, inputs))
    assert again._molora.sites == model._molora.sites


@pytest.mark.parametrize("recipe", GROWING)
def test_a_new_expert_learns(recipe: str, tmp_path: Path) -> None:
    """With a logit that competes, so that a few steps suffice; its B is 0 before the first."""
    model = behaviours.armed(recipe, "llama").train()
    model.add_expert(logit=1.0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        model(**tiny.batch("llama", rows=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = [e[-1][1].any() for path, e in experts(model).items() if len(e) > 1]
    assert sum(map(bool, learned)) > len(learned) / 2
    assert torch.equal(
        tiny.output(reloaded(model.eval(), "llama", tmp_path), tiny.batch("llama")),
        tiny.output(model, tiny.batch("llama")),
    )


def prunable(recipe: str, name: str) -> Any:
    """An armed mixture in which every router has an expert more than it chooses."""

    def roomy(p: Placement) -> Placement:
        k, E = p.gate.top_k or 1, p.r if p.rank_one else p.num_experts
        most, least = (v if isinstance(v, int) else f(v) for v, f in ((k, max), (E, min)))
        return p if p.imported or least > most else p.replace(**{"r" if p.rank_one else "num_experts": most + 1})

    config = behaviours.config(recipe, name)
    return tiny.arm(molora.convert(tiny.base_model(name), changed(config, roomy))).eval()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", PRUNED)
def test_pruning_leaves_the_others_bit_for_bit(recipe: str, name: str, tmp_path: Path) -> None:
    model, inputs = prunable(recipe, name), tiny.batch(name)
    before, rows = experts(model), routers(model)
    model.prune_experts([1])
    after = experts(model)
    for path, old in before.items():
        kept = [e for i, e in enumerate(old) if i != 1] if len(old) > 1 else old
        assert len(after[path]) == len(kept)
        assert all(same(a, b) for a, b in zip(after[path], kept, strict=True))
    for path, weight in routers(model).items():
        wanted = rows[path] if len(rows[path]) == 1 else torch.cat([rows[path][:1], rows[path][2:]])
        assert torch.equal(weight, wanted)
    again = reloaded(model, name, tmp_path)
    assert torch.equal(tiny.output(again, inputs), tiny.output(model, inputs))
    assert [n for n, _ in model._molora.config.adapters] == (["0", "math"] if traits(recipe).imported else [])


def unchosen(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[Any, dict[str, list[int]]]:
    """A tape of one forward, and by router the experts that it gave no token."""
    with molora.record_routing(model) as tape:
        tiny.output(model, inputs)
    used = {site: set(r[0].slot_ids().flatten().tolist()) for site, r in tape.items() if r[0].num_experts > 1}
    return tape, {site: [e for e in range(tape[site][0].num_experts) if e not in ids] for site, ids in used.items()}


@pytest.mark.parametrize("recipe", RENORMALISED)
def test_pruning_experts_that_nobody_chose_changes_rounding_only(recipe: str, tmp_path: Path) -> None:
    """Found by a tape over two tokens, for each router its own; a new expert that nobody chose is among them."""
    model = behaviours.armed(recipe, "llama")
    model.add_expert(logit=-50.0)
    for seed in range(10):
        inputs = tiny.batch("llama", rows=1, length=2, seed=seed)
        tape, dead = unchosen(model, inputs)
        if any(len(gone) > 1 for gone in dead.values()):
            break
    else:
        raise AssertionError("two tokens use all experts of every router")
    assert all(dead.values())
    output = tiny.output(model, inputs)
    model.prune_experts(dead)
    close(tiny.output(model, inputs), output, "same_math_fp32")
    counts = {p: m.site.num_experts for p, m in sites_of(model).values()}
    assert all(counts[site] == tape[site][0].num_experts - len(gone) for site, gone in dead.items())
    again = reloaded(model, "llama", tmp_path)
    assert torch.equal(tiny.output(again, inputs), tiny.output(model, inputs))


def test_what_was_added_and_pruned_again_is_the_mixture_it_was() -> None:
    for recipe in GROWING:
        model = behaviours.armed(recipe, "llama")
        before, rows, output = experts(model), routers(model), tiny.output(model, tiny.batch("llama"))
        model.add_expert()
        routed = [m.site for _, m in sites_of(model).values() if m.router is not None and m.site.num_experts > 1]
        model.prune_experts({site.path: [site.num_experts - 1] for site in routed})
        assert all(all(same(a, b) for a, b in zip(experts(model)[p], before[p], strict=True)) for p in before)
        assert all(torch.equal(routers(model)[p], rows[p]) for p in rows)
        assert torch.equal(tiny.output(model, tiny.batch("llama")), output)


def test_the_config_follows() -> None:
    """A new mixture of the changed config has the changed numbers of experts."""
    for recipe in GROWING:
        model = behaviours.armed(recipe, "llama")
        model.add_expert()
        fresh = molora.convert(tiny.base_model("llama"), model._molora.config)
        assert fresh._molora.sites == model._molora.sites
    model = molora.convert(tiny.base_model("llama"), "smora", r=16, top_k=4, rank_pattern={"q_proj": 8})
    model.prune_experts([0, 3])
    fresh = molora.convert(tiny.base_model("llama"), model._molora.config)
    assert fresh._molora.sites == model._molora.sites


def test_frozen_experts_stay_frozen_and_unloading_is_exact() -> None:
    model = behaviours.armed("meteora", "llama")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    model.prune_experts([0])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    base = tiny.base_model("llama")
    model.unload()
    assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(tiny.output(model, tiny.batch("llama")), tiny.output(base, tiny.batch("llama")))


@pytest.mark.parametrize(
    ("recipe", "change", "reason"),
    [
        ("lora", lambda m: m.add_expert(), "always on"),
        ("lora", lambda m: m.prune_experts([0]), "always on"),
        ("xlora", lambda m: m.add_expert(), "convert the base with one more in adapters"),
        ("meteora", lambda m: m.add_expert(), "convert the base with one more in adapters"),
        ("mola", lambda m: m.add_expert(logit=float("nan")), "logit: got nan, expected a finite number"),
        ("mola", lambda m: m.add_expert(logit=float("-inf")), "logit: got -inf, expected a finite number"),
        ("meteora", lambda m: m.prune_experts(["math"]), "expected a list of indices .*2 is 'math'"),
        ("mixlora", lambda m: m.prune_experts(1), "got 1, expected a list of indices"),
        ("mixlora", lambda m: m.prune_experts([True, False, False, False]), "expected a list of indices"),
        ("mixlora", lambda m: m.prune_experts([4]), "from 0 to 3"),
        ("mixlora", lambda m: m.prune_experts([0, 1, 2]), "at least 2"),
        ("mola", lambda m: m.prune_experts({"lm_head": [0]}), "paths of routers, such as 'model.layers.0.self_attn.q"),
        ("xlora", lambda m: m.prune_experts({"lm_head": [0]}), "adapters of the whole model"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_changes(recipe: str, change: Any, reason: str) -> None:
    model = behaviours.armed(recipe, "llama")
    state = {n: t.clone() for n, t in model.state_dict().items()}
    config = model._molora.config
    with pytest.raises(ConfigError, match=reason):
        change(model)
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert model._molora.config == config


def test_indices_may_come_out_of_a_generator() -> None:
    model = behaviours.armed("mixlora", "llama")
    model.prune_experts(e for e in (0, 2))
    assert {m.site.num_experts for _, m in sites_of(model).values()} == {1, 2}
    model = behaviours.armed("mola", "llama", num_experts=3)
    model.prune_experts({p: (e for e in (0,)) for p, m in sites_of(model).values() if p.endswith("q_proj")})
    assert {m.site.num_experts for p, m in sites_of(model).values() if p.endswith("q_proj")} == {2}


def test_a_start_whose_b_is_not_trained_is_pruned_but_not_added_to() -> None:
    """MiCA trains A alone: a new expert's B would stay 0, and pruning must not set the others' B free."""
    pytest.importorskip("peft", reason="the start is PEFT's code")
    model = molora.convert(tiny.base_model("llama"), "mola", num_experts=4, r=2, init_lora_weights="mica")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ConfigError, match="B is not trained .*'mica'"):
        model.add_expert()
    model.prune_experts([3])
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert not any(n.endswith("lora_B") for n in trainable)


def test_experts_that_are_not_here_are_refused() -> None:
    model = molora.convert(tiny.base_model("llama").to("meta"), "mola", num_experts=3, r=4)
    with pytest.raises(ConfigError, match="on meta"):
        model.prune_experts([1])


def test_experts_that_share_a_logit_are_refused() -> None:
    with pytest.raises(ConfigError, match="share a logit"):
        behaviours.armed("smora", "llama", rank_partition=2).add_expert()


def test_a_new_expert_adds_nothing_whatever_the_others_started_from() -> None:
    model = behaviours.armed("mola", "llama", init_lora_weights=False)
    model.add_expert()
    assert not any(own[-1][1].any() for own in experts(model).values())


class Cosine(LinearRouter):
    """``exp(t) cos(x, w_e) + o_e``: one parameter more for all experts together, and one more for each."""

    def __init__(self, in_features: int, num_experts: int, *rest: Any) -> None:
        super().__init__(in_features, num_experts, *rest)
        self.sharpness = torch.nn.Parameter(torch.zeros(()))
        self.offset = torch.nn.Parameter(torch.zeros(num_experts))

    def _product(self, x_TI: torch.Tensor) -> torch.Tensor:
        x_TI, weight_EI = (torch.nn.functional.normalize(t.float(), dim=-1) for t in (x_TI, self.weight))
        return self.sharpness.exp() * x_TI @ weight_EI.T + self.offset


def test_a_router_of_another_class_stays_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its old experts' logits are the same with an expert more, and after that one has gone again."""
    monkeypatch.setitem(ROUTERS, "like_linear", Cosine)
    config = molora.recipes.mola(num_experts=3, r=2)
    own = tuple(p.replace(router=p.router.replace(kind="like_linear")) for p in config.placements)
    model = tiny.arm(molora.convert(tiny.base_model("llama"), config.replace(placements=own))).eval()
    site = model.model.layers[0].self_attn.q_proj
    x = torch.randn(5, 32)
    before = site.router(x)
    assert before.std() > 0.1
    model.add_expert()
    assert type(site.router) is Cosine
    close(site.router(x)[:, :3], before, "same_math_fp32")
    assert site.router.offset.requires_grad
    model.save_pretrained(tmp_path)
    again = molora.load(tiny.base_model("llama"), tmp_path).eval()
    assert torch.equal(tiny.output(again, tiny.batch("llama")), tiny.output(model, tiny.batch("llama")))
    model.prune_experts([0, 3])
    close(site.router(x), before[:, 1:], "same_math_fp32")
