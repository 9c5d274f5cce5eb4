"""Balance losses: values at uniform and collapsed routing, slow loops, padding, gradients (B11)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from molora.config import BalanceConfig, GateConfig, MoloraConfig
from molora.context import Observation
from molora.recipes import RECIPES
from molora.routers import BALANCES
from molora.routers.balance import Seen, combine
from molora.routers.gates import gate
from tests.support.tiny import batch, converted
from tests.support.tolerances import close

E, K = 6, 2


def cyclic(strength: float = 3.0) -> Tensor:
    """Logits of E tokens that pick every expert, and every slot's expert, equally often: (E, E)."""
    return torch.stack([torch.linspace(strength, 0, E).roll(t) for t in range(E)])


def collapsed() -> Tensor:
    return torch.tensor([100.0] + [0.0] * (E - 1)).repeat(E, 1)


def rule(recipe: str, released: bool) -> BalanceConfig:
    config: MoloraConfig = RECIPES[recipe](released=released)
    return next(b for p in config.placements for b in p.balance if b.kind == "switch")


def value(config: BalanceConfig, logits: list[Tensor], top_k: int) -> tuple[float, float]:
    """(loss without its coefficient, plain mean) over routers in layers 0, 0, 1, 1, ... with one row of tokens."""
    seen, valid = [], torch.ones(1, E, dtype=torch.bool)
    for i, x in enumerate(logits):
        r = gate(x, GateConfig(top_k=top_k, renormalize="one"), top_k)
        tensors = BALANCES[config.kind].observe(config, Seen(r, valid, None, None, False))
        assert tensors is not None
        seen.append(Observation(str(i), i // 2, config, E, tensors, valid.sum(1)))
    loss, mean = combine(config, seen, torch.ones(1))
    return float(loss), float(mean)


# What each method states: (recipe, released, K, loss at balance over 4 routers in 2 layers, at collapse with K = 1)
STATED = [
    ("mixlora", False, 2, 1.0, E),
    ("mixlora", True, 2, 2.0, E),  # f counted per slot: K at balance
    ("mola", False, 2, 1.0, E),
    ("mola", True, 2, 2 * 1.0, 2 * E),  # summed over the two layers
    ("llava_mole", False, 1, 1.0, E),
    ("llava_mole", True, 1, 1 / E, 1.0),  # no factor E
]


@pytest.mark.parametrize(("recipe", "released", "top_k", "uniform", "collapse"), STATED)
def test_stated_values(recipe: str, released: bool, top_k: int, uniform: float, collapse: float):
    config = rule(recipe, released)
    assert config.scope == ("batch" if released and recipe != "llava_mole" else "sequence")
    assert value(config, [cyclic()] * 4, top_k)[0] == pytest.approx(uniform, rel=1e-5)
    assert value(config, [collapsed()] * 4, 1)[0] == pytest.approx(collapse, rel=1e-5)
    if not released:
        assert value(config, [cyclic()] * 4, top_k)[1] == pytest.approx(1.0, rel=1e-5)


def test_pooling_lets_layers_cancel_only_where_it_was_published():
    """One layer collapsed on expert 0, the next on expert 1, ...: unbalanced each, balanced together."""
    logits = [collapsed().roll(i, 1) for i in range(E) for _ in range(2)]
    assert value(rule("mixlora", False), logits, 1)[0] == pytest.approx(E, rel=1e-5)
    assert value(rule("mixlora", True), logits, 1)[0] == pytest.approx(1.0, rel=1e-5)
    assert value(rule("mola", True), logits, 1)[0] == pytest.approx(E * E, rel=1e-5)


def test_dropped_tokens_still_count_as_chosen():
    """f is the share of tokens whose argmax is e (arXiv 2101.03961 eq. 5), before a capacity drops any."""
    r = gate(collapsed(), GateConfig(top_k=1, capacity=2), 1)
    assert (r.ids == -1).sum() == E - 2
    config = BalanceConfig(count="argmax")
    f, _ = BALANCES["switch"].observe(config, Seen(r, torch.ones(1, E, dtype=torch.bool), None, None, False))
    assert f.tolist() == [[1.0, 0, 0, 0, 0, 0]]


def test_gradient_pushes_load_away_from_the_crowded_expert():
    noise = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    logits = (noise + torch.tensor([2.0, 0, 0, 0])).requires_grad_()
    r = gate(logits, GateConfig(top_k=2, renormalize="one"), 2)
    valid = torch.ones(1, 32, dtype=torch.bool)
    f, p = BALANCES["switch"].observe(BalanceConfig(), Seen(r, valid, None, None, False))
    BALANCES["switch"].rows(BalanceConfig(), 4, f, p).sum().backward()
    push = logits.grad.sum(0)
    assert push[0] > 0, "descent lowers the crowded expert's logits"
    assert (push[1:] < 0).all()


# ---- whole models, against slow loops over the routers' logits ----


def logits_of(model: Any, inputs: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Any, dict[str, Tensor]]:
    """Outputs of a training forward, and each router's logits (B, S, E) by site path."""
    seen: dict[str, Tensor] = {}
    model.train()
    hooks = [
        m.register_forward_hook(lambda m, a, y, n=n: seen.update({n.removesuffix(".router"): y.view(*shape, -1)}))
        for n, m in model.named_modules()
        if n.endswith(".router") and m.state_dict()
    ]
    try:
        return model(**inputs), seen
    finally:
        for h in hooks:
            h.remove()


def slow_switch(
    config: BalanceConfig, routers: dict[str, Tensor], K: dict[str, int], valid: Tensor, n: list[float]
) -> float:
    """The rule, token by token; ``K``: choices by layer; ``n``: predicted labels of each row."""
    pools: dict[Any, list[tuple[Tensor, int]]] = {}
    for path, logits in routers.items():
        layer = path.split(".")[2]
        key = {"router": path, "layer": layer, "model": "all"}[config.pooling]
        pools.setdefault(key, []).append((logits, K[layer]))
    rows = range(valid.shape[0])
    groups = [[b] for b in rows] if config.scope == "sequence" else [list(rows)]
    values = []
    for pool in pools.values():
        experts, out = pool[0][0].shape[-1], 0.0
        for group in groups:
            f, P, count = [0.0] * experts, [0.0] * experts, 0
            for logits, k in pool:
                for b, s in ((b, s) for b in group for s in range(valid.shape[1])):
                    if config.mask_padding and not valid[b, s]:
                        continue
                    p = torch.softmax(logits[b, s].double(), -1).tolist()
                    order = sorted(range(experts), key=lambda e: -p[e])[: 1 if config.count == "argmax" else k]
                    for e in order:
                        f[e] += 1 / k if config.count == "picks" else 1.0
                    P = [a + b for a, b in zip(P, p, strict=True)]
                    count += 1
            product = sum(a * b for a, b in zip(f, P, strict=True)) / count**2
            out += sum(n[b] for b in group) / sum(n) * product * (experts if config.factor == "experts" else 1)
        values.append(out)
    return sum(values) if config.reduction == "sum" else sum(values) / len(values)


def padded(rows: int = 2, length: int = 7) -> dict[str, Tensor]:
    """Row 0 whole with its prompt not predicted (2 labels), row 1 with two tokens of padding (4 labels)."""
    inputs = batch("llama", rows, length)
    inputs["attention_mask"][1, -2:] = 0
    inputs["labels"][1, -2:] = -100
    inputs["labels"][0, :5] = -100
    return inputs


@pytest.mark.parametrize("scope", ["sequence", "batch"])
@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("recipe", ["mixlora", "mola", "llava_mole"])
def test_model_loss_is_the_slow_loop(recipe: str, released: bool, scope: str, root: Path):
    own = {"released": released, "balance_scope": scope, "router_aux_loss_coef": 0.5, "lora_dropout": 0.0}
    if recipe == "mola":
        own["top_k"] = (1, 2)
    model, inputs = converted(recipe, "llama", root, **own), padded()
    config = model._molora.config.placements[0].balance[0]
    assert (config.scope, config.coef) == (scope, 0.5)
    with torch.no_grad():
        outputs, routers = logits_of(model, inputs, (2, 7))
        plain = model.eval()(**inputs)
    assert getattr(plain, "aux_loss", None) is None, "only in training"
    K = {"mixlora": {"0": 2, "1": 2}, "mola": {"0": 1, "1": 2}, "llava_mole": {"0": 1, "1": 1}}[recipe]
    expected = slow_switch(config, routers, K, inputs["attention_mask"], [2.0, 4.0])
    assert float(outputs.loss - plain.loss) == pytest.approx(0.5 * expected, rel=1e-4)


@pytest.mark.parametrize("recipe", ["mixlora", "mola", "llava_mole"])
def test_padding_is_ignored(recipe: str, root: Path):
    """Longer padding with other content, on either side, leaves the auxiliary loss alone."""
    model = converted(recipe, "llama", root).train()
    rows = batch("llama", 2, 6)
    with torch.no_grad():
        plain = model(**rows).aux_loss
        for side in ("right", "left"):
            junk = torch.randint(3, 64, (2, 3), generator=torch.Generator().manual_seed(8))
            extra = {"input_ids": junk, "attention_mask": junk * 0, "labels": junk * 0 - 100}
            long = {k: torch.cat((v, extra[k]) if side == "right" else (extra[k], v), 1) for k, v in rows.items()}
            long["position_ids"] = (long["attention_mask"].cumsum(1) - 1).clamp_min(0)
            close(model(**long).aux_loss, plain, "same_math_fp32")


def test_z_loss(root: Path):
    own = {"routing": "switch", "router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}
    model, inputs = converted("mixlora", "llama", root, **own), padded()
    with torch.no_grad():
        outputs, routers = logits_of(model, inputs, (2, 7))
        plain = model.eval()(**inputs)
    values = []
    for logits in routers.values():
        total = 0.0
        for b, real, share in ((0, 7, 2 / 6), (1, 5, 4 / 6)):
            z = [math.log(sum(math.exp(v) for v in logits[b, s].tolist())) ** 2 for s in range(real)]
            total += share * sum(z) / real
        values.append(total)
    assert float(outputs.loss - plain.loss) == pytest.approx(0.1 * sum(values) / len(values), rel=1e-4)
    assert outputs.get("aux_loss") is None, "1 means balanced there; a z-loss says nothing of balance"
