"""Sorted mixtures on a CPU: the order against a plain loop, the operators against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from molora.errors import ConfigError
from molora.kernels.reference import rank_mix_loop
from molora.kernels.sorted import ops as grouped_ops
from molora.kernels.sorted.ops import gather_mix, grouped_lora, sorted_mix
from molora.kernels.sorted.order import most_tiles, order_of_ends, order_of_ids, tile_ends
from molora.kernels.tiles import TILES
from tests.kernels.test_kernels_reference import layout_of
from tests.support.tolerances import close

ROUTINGS = {
    "no_tokens": (0, 2, 3),
    "one_token": (1, 1, 3),
    "more_experts_than_tokens": (3, 2, 50),
    "one_expert": (40, 2, 1),
    "no_experts": (7, 2, 0),
    "many": (130, 3, 8),
}
# (tokens, ranks, slots)
MIXES = {
    "no_tokens": (0, (3, 3), 1),
    "one_token": (1, (3, 3), 2),
    "equal_ranks": (17, (2, 2, 2), 2),
    "unequal_ranks": (17, (5, 3, 7), 3),
    "an_empty_expert": (17, (1, 0, 2), 2),
    "rank_one": (9, (1,) * 12, 4),
    "one_expert": (5, (4,), 1),
}
NAMES = ("base", "x", "A", "B", "weights")


def ids_of(T: int, K: int, E: int) -> Tensor:
    """Duplicates within a token, experts that idle, and both marks of an empty slot."""
    return torch.randint(-1, E + 1, (T, K), generator=torch.Generator().manual_seed(1))


def mix(T: int, ranks: tuple[int, ...], K: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], Any]:
    g = torch.Generator().manual_seed(2)
    R, E = sum(ranks), len(ranks)
    shapes = {"base": (T, 6), "x": (T, 9), "A": (R, 9), "B": (6, R), "weights": (T, K)}
    a: dict[str, Any] = {n: torch.randn(s, generator=g, dtype=dtype).requires_grad_() for n, s in shapes.items()}
    layout = layout_of(ranks, tuple(0.5 + e / 4 for e in range(E)))
    start = torch.tensor([sum(ranks[:e]) for e in range(E + 1)])
    maps = {"start_E": start, "scale_R": layout.scale_R, "max_rank": max(ranks)}
    return {**a, "ids": ids_of(T, K, E), **maps}, layout


def mixed(a: dict[str, Any]) -> Tensor:
    return sorted_mix(*(a[n] for n in (*NAMES, "ids")), **{n: a[n] for n in ("start_E", "scale_R", "max_rank")})


def formula(a: dict[str, Any], layout: Any) -> Tensor:
    one_hot_TKE = a["ids"].unsqueeze(-1) == torch.arange(len(layout.ranks))
    weights_TE = torch.where(one_hot_TKE, a["weights"].unsqueeze(-1), 0).sum(1)
    return rank_mix_loop(*(a[n] for n in NAMES[:4]), weights_TE, layout)


@pytest.mark.parametrize("name", ROUTINGS)
def test_the_order_is_that_of_a_plain_loop(name: str):
    T, K, E = ROUTINGS[name]
    ids = ids_of(T, K, E)
    order = order_of_ids(ids, E)
    for j in range(K):
        expert = [e if 0 <= e < E else E for e in ids[:, j].tolist()]
        groups = [[t for t in range(T) if expert[t] == e] for e in range(E + 1)]
        assert order.token_KT is not None
        assert order.token_KT[j].tolist() == sum(groups, [])
        assert order.end_KE[j].tolist() == [sum(map(len, groups[: e + 1])) for e in range(E + 1)]


@pytest.mark.parametrize("block", [1, 16, 64])
@pytest.mark.parametrize("name", ROUTINGS)
def test_tiles_cover_each_row_once_and_fit_the_grid(name: str, block: int):
    T, K, E = ROUTINGS[name]
    end_KE = order_of_ids(ids_of(T, K, E), E).end_KE
    for ends, tiles in zip(end_KE.tolist(), tile_ends(end_KE, block).tolist(), strict=True):
        rows = []
        for p in range(most_tiles(T, E, block)):
            e = sum(end <= p for end in tiles)
            if e <= E:
                first, lo = (tiles[e - 1], ends[e - 1]) if e else (0, 0)
                rows += range(lo + (p - first) * block, min(ends[e], lo + (p - first + 1) * block))
        assert rows == list(range(T))


def test_the_grid_is_what_the_worst_routing_needs():
    ids = torch.tensor([-1, 0, 1, 2, 3] + [2] * 8).unsqueeze(1)
    assert int(tile_ends(order_of_ids(ids, 4).end_KE, 4)[0, -1]) == most_tiles(13, 4, 4) == 7


def test_both_products_of_a_kind_have_tiles_of_the_same_rows():
    shrink, expand = ({k[1:]: t.rows for k, t in TILES.items() if k[0] == f"grouped_{n}"} for n in ("shrink", "expand"))
    assert shrink == expand


def test_ends_beyond_the_rows_or_out_of_order_are_brought_back():
    given = {(2, 5): [2, 5, 9], (4, 3): [4, 4, 9], (-2, 30): [0, 9, 9], (): [9]}
    for ends, wanted in given.items():
        assert order_of_ends(torch.tensor(ends, dtype=torch.int32), 9).end_KE.tolist() == [wanted]


@pytest.mark.parametrize("name", MIXES)
def test_sorted_mix_is_the_formula(name: str):
    a, layout = mix(*MIXES[name])
    got, expected = mixed(a), formula(a, layout)
    close(got, expected, "formula")
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours, theirs = (torch.autograd.grad(y, [a[n] for n in NAMES], seed, allow_unused=True) for y in (got, expected))
    for n, p, q in zip(NAMES, ours, theirs, strict=True):
        close(p, torch.zeros_like(a[n]) if q is None else q, "formula")


def test_gradcheck():
    a, _ = mix(4, (2, 0, 3), 2)
    assert torch.autograd.gradcheck(
        lambda *given: mixed({**a, **dict(zip(NAMES, given, strict=True))}), tuple(a[n] for n in NAMES)
    )


def test_an_empty_slot_counts_nothing_whatever_its_weight_is():
    a, _ = mix(6, (2, 3), 2)
    a["ids"][2], a["ids"][3] = -1, 2
    with torch.no_grad():
        a["weights"][2:4] = torch.nan
    y = mixed(a)
    assert torch.equal(y[2:4], a["base"][2:4])
    assert not torch.autograd.grad(y.sum(), a["weights"])[0][2:4].any()


@pytest.mark.parametrize("with_base", [True, False])
def test_grouped_lora_is_the_formula(with_base: bool):
    a, layout = mix(17, (3, 3), 1)
    a["ids"] = torch.bucketize(torch.arange(17), torch.tensor([6, 13]), right=True).unsqueeze(1)
    one = {**a, "weights": torch.ones(17, 1, dtype=torch.float64)}
    base = a["base"] if with_base else torch.zeros_like(a["base"])
    ends = torch.tensor([6, 13], dtype=torch.int32)
    got = grouped_lora(a["x"], a["A"], a["B"], ends, a["scale_R"], a["base"] if with_base else None)
    expected = formula({**one, "base": base}, layout)
    close(got, expected, "formula")
    seed = torch.randn(got.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for p, q in zip(*(torch.autograd.grad(y, [a[n] for n in NAMES[1:4]], seed) for y in (got, expected)), strict=True):
        close(p, q, "formula")


def test_gather_mix_is_the_formula_and_refuses_to_train():
    a, layout = mix(3, (5, 0, 7), 2)
    given = [a[n] for n in (*NAMES, "ids")]
    maps = {n: a[n] for n in ("start_E", "scale_R", "max_rank")}
    with pytest.raises(ConfigError, match="wants a gradient"):
        gather_mix(*given, **maps)
    with torch.no_grad():
        close(gather_mix(*given, **maps), formula(a, layout), "formula")


def test_operators_pass_opcheck():
    a, _ = mix(6, (2, 3), 2, torch.float32)
    a["base"] = a["base"].detach().t().contiguous().t().requires_grad_()
    end, maps = torch.tensor([2, 5]), (a["start_E"], a["scale_R"], a["max_rank"])
    given = tuple(a[n] for n in NAMES)
    torch.library.opcheck(grouped_ops.sorted_mix_op, (*given, a["ids"], None, *maps))
    torch.library.opcheck(grouped_ops.sorted_mix_op, (None, *given[1:4], None, None, end, *maps))
    torch.library.opcheck(grouped_ops.gather_mix_op, (*(t.detach() for t in given), a["ids"], *maps))
    _, h, token, ends = grouped_ops.sorted_mix_op(*given, a["ids"], None, *maps)
    for needs in ([True] * 4, [False] * 4, [False, True, False, True]):
        saved = (*(a[n] for n in NAMES[1:]), *maps[:2], h, token, ends, a["max_rank"], needs)
        given = tuple(t.detach() if isinstance(t, Tensor) else t for t in (a["base"], *saved))
        torch.library.opcheck(grouped_ops.sorted_mix_backward_op, given)


def test_one_graph_for_any_number_of_tokens():
    torch._dynamo.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(mixed, backend=backend, fullgraph=True, dynamic=True)
    for T in (17, 33, 5):
        a, _ = mix(T, (5, 3, 7), 2)
        y, expected = compiled(a), mixed(a)
        close(y, expected, "formula")
        for p, q in zip(*(torch.autograd.grad(t.sum(), [a[n] for n in NAMES]) for t in (y, expected)), strict=True):
            close(p, q, "formula")
    assert len(graphs) == 1


def test_autocast_takes_products_in_its_dtype():
    a, _ = mix(8, (2, 3), 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixed(a)
    assert y.dtype == torch.float32
    lowered = {**a, "x": a["x"].bfloat16()}
    assert torch.equal(y, mixed(lowered))


def test_no_ranks_or_no_slots_leave_the_base():
    a, _ = mix(4, (2, 3), 2)
    assert mixed({**a, "weights": a["weights"][:, :0], "ids": a["ids"][:, :0]}) is a["base"]
    none = {
        "A": a["A"][:0],
        "B": a["B"][:, :0],
        "scale_R": a["scale_R"][:0],
        "max_rank": 0,
        "start_E": a["start_E"] * 0,
    }
    assert mixed({**a, **none}) is a["base"]
    assert not grouped_lora(a["x"], none["A"], none["B"], torch.tensor([2, 4]), none["scale_R"]).any()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": torch.zeros(4, 3, 3)}, "x of 3 dimensions"),
        ({"x": torch.zeros(4, 9, dtype=torch.int64)}, "x of torch.int64"),
        ({"A": torch.zeros(5, 8)}, "A of shape"),
        ({"B": torch.zeros(6, 4)}, "B of shape"),
        ({"base": torch.zeros(3, 6)}, "base of shape"),
        ({"ids": torch.zeros(4, 2)}, "an integer dtype"),
        ({"ids": torch.zeros(8, dtype=torch.int64)}, "ids of 1 dimensions"),
        ({"weights": torch.zeros(4, 3)}, "weights of shape"),
        ({"weights": torch.zeros(4, 2, device="meta")}, "weights on meta"),
        ({"scale_R": torch.zeros(4)}, "scale of shape"),
        ({"start_E": torch.zeros(0, dtype=torch.int32)}, "empty start"),
        ({"max_rank": 2}, "experts of at most 2"),
        ({"max_rank": 129}, "at most 128; use rank_mix"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_bad_arguments_are_named(change: dict[str, Any], says: str):
    a, _ = mix(4, (2, 3), 2)
    with pytest.raises(ConfigError, match=says):
        mixed({**a, **change})


def test_sorted_rows_need_ranks_that_divide():
    a, _ = mix(4, (2, 3), 1)
    with pytest.raises(ConfigError, match="expected a multiple"):
        grouped_lora(a["x"], a["A"], a["B"], torch.tensor([2, 4]), a["scale_R"])
    with pytest.raises(ConfigError, match="both or neither"):
        grouped_lora(a["x"], a["A"], a["B"], torch.tensor([2, 4]), a["scale_R"], max_rank=3)
