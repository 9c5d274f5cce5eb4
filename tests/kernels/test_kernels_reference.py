"""The kernels mean the formula: each against a triple loop in float64, forward and every gradient."""

from __future__ import annotations

import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from molora.kernels import dispatch, reference
from molora.kernels.dispatch import Call, choose
from tests.support.tolerances import TOLERANCES, close


class Case(NamedTuple):
    tokens: int
    wide: int  # in_features
    out: int  # out_features
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    top_k: int | None  # None: every expert on with weight 1
    pattern: str = "random"


REFERENCES = {"torch": reference.rank_mix_concat, "loop": reference.rank_mix_loop}
ODD = (0.5, 2.0, 1.25)
CASES = {
    "no_tokens": Case(0, 5, 7, (3, 3), (2.0, 2.0), 1),
    "one_token": Case(1, 5, 7, (3, 3), (2.0, 2.0), 1),
    "odd_sizes": Case(63, 13, 11, (3,) * 5, (2.0,) * 5, 2),
    "ragged": Case(63, 13, 11, (1, 7, 4), ODD, 2),
    "ragged_with_empty_expert": Case(17, 9, 6, (3, 0, 5), ODD, 2),
    "only_empty_experts": Case(4, 9, 6, (0, 0), (1.0, 1.0), 1),
    "equal_ranks_unequal_scales": Case(17, 9, 6, (2, 2, 2), ODD, 2),
    "unequal_ranks_equal_scales": Case(17, 9, 6, (2, 1, 4), (0.5,) * 3, 2),
    "rank_one": Case(31, 9, 6, (1,) * 8, (0.25,) * 8, 3),
    "all_to_one_expert": Case(17, 9, 6, (2, 2, 2), (2.0,) * 3, 1, "first"),
    "one_expert_idle": Case(17, 9, 6, (2, 2, 2), (2.0,) * 3, 2, "never_last"),
    "k_is_e": Case(17, 9, 6, (2, 3, 1), ODD, 3),
    "single_expert": Case(17, 9, 6, (4,), (2.0,), 1),
    "always_on": Case(17, 9, 6, (4, 4), (2.0, 2.0), None),
    "always_on_ragged": Case(17, 9, 6, (4, 1), (2.0, 0.5), None),
}


class Setup(NamedTuple):
    leaves: dict[str, Tensor]  # base, x, A, B and, unless always on, weights
    ids: Tensor | None
    layout: reference.Layout


def layout_of(ranks: tuple[int, ...], scales: tuple[float, ...]) -> reference.Layout:
    owner = torch.tensor([e for e, r in enumerate(ranks) for _ in range(r)], dtype=torch.int64)
    scale_R = torch.tensor([scales[e] for e in owner.tolist()], dtype=torch.float32)
    return reference.Layout(ranks, scales, owner, scale_R)


def setup(case: Case, dtype: torch.dtype) -> Setup:
    g = torch.Generator().manual_seed(3)
    R = sum(case.ranks)
    xy = {"base": (case.tokens, case.out), "x": (case.tokens, case.wide)}
    shapes = {**xy, "A": (R, case.wide), "B": (case.out, R)}
    leaves = {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    ids = None
    if case.top_k is not None:
        pool = len(case.ranks) - (case.pattern == "never_last")
        order = torch.rand(case.tokens, pool, generator=g).argsort(-1)[:, : case.top_k]
        ids = torch.zeros_like(order) if case.pattern == "first" else order
        leaves["weights"] = torch.randn(ids.shape, generator=g, dtype=torch.float64).to(dtype)
    return Setup({n: t.requires_grad_() for n, t in leaves.items()}, ids, layout_of(case.ranks, case.scales))


def spread(s: Setup) -> Tensor | None:
    """The (T, E) weights that the kernels take, made of (T, K) choices without molora's own function."""
    if s.ids is None:
        return None
    one_hot = torch.nn.functional.one_hot(s.ids, len(s.layout.ranks)).to(s.leaves["weights"].dtype)
    return (one_hot * s.leaves["weights"].unsqueeze(-1)).sum(1)


def triple_loop(s: Setup) -> Tensor:
    """y[t] = base[t] + sum_e sum_j w[t, e] s_e (A[j] . x[t]) B[:, j], j over the ranks of expert e, one at a time."""
    base, x, A, B = (s.leaves[n].unbind(dim) for n, dim in (("base", 0), ("x", 0), ("A", 0), ("B", 1)))
    weights = spread(s)
    rows = []
    for t in range(len(x)):
        y, j = base[t], 0
        for e, r in enumerate(s.layout.ranks):
            for _ in range(r):
                u = s.layout.scales[e] * (A[j] @ x[t])
                y = y + B[j] * (u if weights is None else u * weights[t, e])
                j += 1
        rows.append(y)
    return torch.stack(rows) if rows else s.leaves["base"] * 1


def gradients(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), seed, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for (n, t), g in zip(leaves.items(), grads, strict=True)}


def run(kernel: str, s: Setup) -> Tensor:
    return REFERENCES[kernel](*(s.leaves[n] for n in ("base", "x", "A", "B")), spread(s), s.layout)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel allocates without filling it is NaN, so an element it forgets to write shows."""

    def poison(original):  # type: ignore[no-untyped-def]
        def allocate(*args, **kwargs):  # type: ignore[no-untyped-def]
            out = original(*args, **kwargs)
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))
            return out.fill_(float("nan")) if caller.startswith("molora.kernels") and out.is_floating_point() else out

        return allocate

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(Tensor, name, poison(getattr(Tensor, name)))


def test_poison_reaches_callers_in_the_kernels_only():
    there = {"__name__": "molora.kernels.probe", "torch": torch}
    exec("t = torch.empty(3); u = torch.ones(1).new_empty(2)", there)  # noqa: S102
    assert there["t"].isnan().all()
    assert there["u"].isnan().all()
    assert not torch.ones(3).new_empty(0).isnan().any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("kernel", REFERENCES)
def test_kernel_is_the_formula(kernel: str, case: Case):
    """B2: float64 against the triple loop, value and the gradient to x, A, B, weights and base."""
    s = setup(case, torch.float64)
    expected, got = triple_loop(s), run(kernel, s)
    close(got, expected, "formula")
    wanted = gradients(expected, s.leaves)
    for name, grad in gradients(got, s.leaves).items():
        close(grad, wanted[name], "formula")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_concat_in_low_precision(case: Case, dtype: torch.dtype):
    """B1: the same inputs, rounded, against the loop in float64; relative to the root mean square."""
    low = setup(case, dtype)
    high = low._replace(leaves={n: t.detach().double().requires_grad_() for n, t in low.leaves.items()})
    expected, got = triple_loop(high), run("torch", low)
    assert got.dtype == dtype
    pairs = {"y": (got, expected)}
    wanted = gradients(expected, high.leaves)
    pairs |= {n: (g, wanted[n]) for n, g in gradients(got, low.leaves).items()}
    limit = TOLERANCES["bf16" if dtype == torch.bfloat16 else "same_math_fp32"].rtol
    for name, (a, b) in pairs.items():
        rms = b.square().mean().sqrt().item() if b.numel() else 0.0
        error = (a.double() - b).square().mean().sqrt().item() if b.numel() else 0.0
        assert error <= limit * max(rms, 1e-6), f"{name}: {error / max(rms, 1e-6):.2e}"


@pytest.mark.parametrize("kernel", REFERENCES)
@pytest.mark.parametrize("case", ["odd_sizes", "ragged_with_empty_expert", "always_on_ragged", "rank_one"])
def test_gradcheck(kernel: str, case: str):
    s = setup(CASES[case]._replace(tokens=3), torch.float64)

    def f(*leaves: Tensor) -> Tensor:
        return run(kernel, s._replace(leaves=dict(zip(s.leaves, leaves, strict=True))))

    assert torch.autograd.gradcheck(f, tuple(s.leaves.values()))


def test_idle_expert_gets_a_zero_gradient_and_not_none():
    s = setup(CASES["one_expert_idle"], torch.float32)
    run("torch", s).sum().backward()
    grads = {n: s.leaves[n].grad for n in ("A", "B")}
    assert all(g is not None for g in grads.values())
    used = {"A": grads["A"][:-2], "B": grads["B"][:, :-2]}
    idle = {"A": grads["A"][-2:], "B": grads["B"][:, -2:]}
    assert all(t.any() for t in used.values())
    assert not any(t.any() for t in idle.values())


def test_inputs_are_not_changed():
    """C12: no kernel writes into what it is given."""
    for kernel in REFERENCES:
        s = setup(CASES["ragged"], torch.float32)
        before = {n: t.detach().clone() for n, t in s.leaves.items()}
        with torch.no_grad():
            y = run(kernel, s)
        assert all(torch.equal(s.leaves[n], t) for n, t in before.items())
        assert y.data_ptr() not in {t.data_ptr() for t in s.leaves.values()}


def test_choice_has_a_reason_and_refuses_unknown_names():
    call = Call(64, "cpu", torch.float32)
    assert choose("auto", call) == ("torch", "the tensors are on cpu")
    asked = choose("loop", call)
    assert asked.name == "loop"
    assert "asked" in asked.reason
    with pytest.raises(ValueError, match="did you mean 'torch'"):
        choose("torhc", call)
    assert choose("concat", call) == choose("torch", call), "its name in the first edition"


def test_choice_on_cuda_depends_on_dtype_and_ranks_alone():
    """No device is needed to ask."""
    assert choose("auto", Call(64, "cuda", torch.bfloat16)).name == "triton"
    for call, why in ((Call(64, "cuda", torch.float64), "float64"), (Call(5000, "cuda", torch.bfloat16), "4096")):
        assert choose("auto", call).name == "torch"
        assert why in choose("auto", call).reason


def test_many_ranks_are_sorted_and_few_tokens_of_many_experts_gathered():
    """By sizes: two passes over sorted tokens against a product with all ranks; rows of a few experts against both."""
    many = Call(2048, "cuda", torch.bfloat16, experts=64, choices=2, max_rank=32, tokens=4096)
    assert choose("auto", many).name == "sorted"
    assert choose("auto", many._replace(total_rank=900)).name == "triton"
    assert choose("auto", many._replace(choices=0)).name == "triton"
    assert choose("auto", many._replace(max_rank=200)).name == "triton"
    assert choose("auto", many._replace(tokens=1, grad=False)).name == "gather"
    assert choose("auto", many._replace(tokens=1)).name == "sorted"
    with pytest.raises(ValueError, match="no_grad"):
        choose("gather", many)
    with pytest.raises(ValueError, match="every expert counts"):
        choose("sorted", many._replace(choices=0))


@pytest.mark.skipif(dispatch.INTERPRETED, reason="in the interpreter Triton kernels run on the CPU")
def test_triton_without_a_device_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match="CUDA device.*kernel='auto'"):
        choose("triton", Call(64, "cpu", torch.float32))
