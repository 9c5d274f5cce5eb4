"""The operators on a CPU: float64 gradients, PyTorch's own checks, one graph for all lengths, bad input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from molora.errors import ConfigError
from molora.kernels import dispatch, functional
from molora.kernels.rank.ops import rank_mix_linear_op, rank_mix_op
from molora.kernels.rank.slot_ops import contract_slots_op, expand_slots_op

pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="float64 is for plain PyTorch")

T, WIDE, OUT, RANKS, K = 7, 5, 6, (2, 3, 1), 2
R = sum(RANKS)


def tensors(tokens: int = T, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    shapes = {"base": (tokens, OUT), "x": (tokens, WIDE), "A": (R, WIDE), "B": (OUT, R), "weights": (tokens, K)}
    leaves = {n: torch.randn(s, generator=g).to(dtype).requires_grad_() for n, s in shapes.items()}
    ids = torch.randint(-1, 4, (tokens, K), generator=g)  # -1 and 3 are empty slots
    expert = torch.tensor([e for e, r in enumerate(RANKS) for _ in range(r)])
    return {**leaves, "ids": ids, "expert": expert, "scale": torch.linspace(0.5, 2, R)}


def arguments(name: str, a: dict[str, Any]) -> tuple[Any, tuple[Any, ...]]:
    """The operator and its arguments."""
    common = (a["A"], a["B"])
    who = (a["weights"], a["ids"], a["expert"], a["scale"])
    slots = a["x"].unsqueeze(1).expand(-1, K, -1).contiguous()
    lists = tuple([t, t] for t in (*common, *who))
    W = torch.ones(OUT, WIDE, dtype=a["x"].dtype)
    return {
        "top_k": (rank_mix_op, (a["base"], a["x"], *common, *who)),
        "dense": (rank_mix_op, (a["base"], a["x"], *common, a["weights"][:, [0, 1, 0]], None, *who[2:])),
        "always": (rank_mix_op, (a["base"], a["x"], *common, None, None, *who[2:])),
        "linears": (rank_mix_linear_op, (a["x"], [W, 2 * W], [W[:, 0], a["x"].new_empty(0)], *lists)),
        "expand": (expand_slots_op, (a["base"], a["x"], *common, *who[1:])),
        "contract": (contract_slots_op, (a["base"], slots, a["weights"], *common, *who[1:])),
    }[name]


NAMES = ("top_k", "dense", "always", "linears", "expand", "contract")


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_function(name: str):
    a = tensors()

    def call(*leaves: Tensor) -> Any:
        op, args = arguments(name, {**a, **dict(zip(("base", "x", "A", "B", "weights"), leaves, strict=True))})
        return op(*args)[0]

    assert torch.autograd.gradcheck(call, tuple(a[n] for n in ("base", "x", "A", "B", "weights")))


@pytest.mark.parametrize("tokens", [0, T])
@pytest.mark.parametrize("name", NAMES)
def test_operators_keep_pytorchs_rules(name: str, tokens: int):
    """Schema, shapes without running, autograd registration, and the same under the compiler's tracing."""
    op, args = arguments(name, tensors(tokens, torch.float32))
    opcheck(op, args)


FUNCTIONS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], Tensor]] = {
    "rank_mix": lambda a, m: functional.rank_mix(a["base"], a["x"], a["A"], a["B"], a["weights"], a["ids"], **m),
    "rank_mix_linear": lambda a, m: functional.rank_mix_linear(
        a["x"], torch.ones(OUT, WIDE), None, a["A"], a["B"], a["weights"], a["ids"], **m
    ),
    "expand_slots": lambda a, m: functional.expand_slots(a["base"], a["x"], a["A"], a["B"], a["ids"], **m),
    "contract_slots": lambda a, m: functional.contract_slots(
        a["base"], a["x"].unsqueeze(1).expand(-1, K, -1), a["weights"], a["A"], a["B"], a["ids"], **m
    ),
}


def call(name: str, a: dict[str, Any]) -> Tensor:
    return FUNCTIONS[name](a, {"expert_R": a["expert"], "scale_R": a["scale"]})


@pytest.mark.parametrize("name", FUNCTIONS)
def test_one_graph_for_every_length(name: str):
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(1)
        return graph.forward

    compiled = torch.compile(lambda a: call(name, a), backend=backend, fullgraph=True, dynamic=True)
    for tokens in (17, 33, 5):
        a = tensors(tokens, torch.float32)
        torch.testing.assert_close(compiled(a), call(name, a))
    assert len(graphs) == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "x of three dimensions": ({"x": torch.ones(2, 3, WIDE)}, "3 dimensions, expected .tokens, width."),
    "integers for x": ({"x": torch.ones(T, WIDE, dtype=torch.int64)}, "torch.int64, expected float32"),
    "A of another width": ({"A": torch.ones(R, WIDE + 1)}, "A of shape .6, 6., expected .6, 5."),
    "B of other ranks": ({"B": torch.ones(OUT, R + 1)}, "B of shape"),
    "base of other tokens": ({"base": torch.ones(T + 1, OUT)}, "base of shape .8, 6., expected .7, 6."),
    "ids of other tokens": ({"ids": torch.zeros(T + 1, K, dtype=torch.int64)}, "weights of shape"),
    "ids of floats": ({"ids": torch.zeros(T, K)}, "ids of torch.float32, expected an integer"),
    "weights of integers": (
        {"weights": torch.ones(T, K, dtype=torch.int64)},
        "weights of torch.int64, expected a float",
    ),
    "an expert too few": ({"expert": torch.zeros(R - 1, dtype=torch.int64)}, "expert of shape"),
    "a tensor elsewhere": ({"scale": torch.ones(R, device="meta")}, "scale on meta, expected cpu"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name: str):
    changes, said = BAD[name]
    with pytest.raises(ConfigError, match=said):
        call("rank_mix", {**tensors(dtype=torch.float32), **changes})


def test_too_many_ranks_are_sent_to_the_sorted_kernels():
    a = tensors(dtype=torch.float32)
    many = {"A": torch.ones(5000, WIDE), "B": torch.ones(OUT, 5000), "expert": torch.zeros(5000, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="at most 4096; use kernel='sorted'"):
        call("rank_mix", {**a, **many, "scale": torch.ones(5000)})


def test_a_trained_weight_is_refused_by_the_frozen_linear():
    a = tensors(dtype=torch.float32)
    W = torch.ones(OUT, WIDE, requires_grad=True)
    maps = {"expert_R": a["expert"], "scale_R": a["scale"]}
    with pytest.raises(ConfigError, match="wants a gradient, expected frozen"):
        functional.rank_mix_linear(a["x"], W, None, a["A"], a["B"], a["weights"], a["ids"], **maps)


def test_no_ranks_and_no_experts_leave_the_base():
    a = tensors(dtype=torch.float32)
    none = {"A": torch.ones(0, WIDE), "B": torch.ones(OUT, 0), "expert": torch.zeros(0, dtype=torch.int64)}
    assert torch.equal(call("rank_mix", {**a, **none, "scale": torch.ones(0)}), a["base"])
    assert torch.equal(call("expand_slots", {**a, **none, "scale": torch.ones(0)})[:, 0], a["base"])
    assert torch.equal(call("contract_slots", {**a, **none, "scale": torch.ones(0)}), a["base"])
