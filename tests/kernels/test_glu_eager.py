"""``mix_glu`` in plain PyTorch against its formula, its gradients, and its place among the operators of PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from molora.activations import ACTIVATIONS
from molora.errors import ConfigError
from molora.kernels.glu import eager as glu_eager
from molora.kernels.glu.ops import mix_glu, mix_glu_backward_op, mix_glu_op
from tests.support.glu_cases import CASES, NAMES, Case, by_the_formula, in_float64, off_by, operands, results
from tests.support.tolerances import close

SMALL = Case(5, 6, (2, 1, 2), 2, empty=True)


@pytest.mark.parametrize("name", CASES)
def test_results_and_gradients_are_the_formulas(name: str) -> None:
    g = operands(CASES[name], torch.float64)
    exact = results(g, by_the_formula(g))
    for what, x in results(g, mix_glu(*g)).items():
        close(x, exact[what], "formula")


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck(act: str) -> None:
    g = operands(SMALL._replace(act=act, empty=False), torch.float64)
    names, leaves = zip(*((n, x) for n, x in zip(NAMES, g[:8], strict=True)), strict=True)

    def run(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        return mix_glu(*g._replace(**dict(zip(names, leaves, strict=True))))

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_lower_dtypes_stay_within_a_few_units_of_their_last_place(dtype: torch.dtype, limit: float) -> None:
    """The limits are about 16, 4 and 4 units: float32 is summed in an unknown order, halves are rounded twice."""
    g = operands(CASES["ragged_ranks_empty_slots"], dtype)
    double = in_float64(g)
    exact = results(double, by_the_formula(double))
    for what, x in results(g, mix_glu(*g)).items():
        assert x.dtype == (torch.float32 if what == "dweights" else dtype)
        assert off_by(x, exact[what]) <= limit, what


def test_parameters_in_float32_get_gradients_in_float32() -> None:
    g = operands(CASES["two_slots"], torch.bfloat16)
    B1, B3, A2 = (x.detach().float().requires_grad_() for x in g[4:7] if isinstance(x, Tensor))
    mixed = g._replace(B1=B1, B3=B3, A2=A2)
    got, low = results(mixed, mix_glu(*mixed)), results(g, mix_glu(*g))
    for name in ("dB1", "dB3", "dA2"):
        assert got[name].dtype == torch.float32
        assert torch.equal(got[name].bfloat16(), low[name])
    assert torch.equal(got["hbar"], low["hbar"])


@pytest.mark.parametrize("asked", NAMES)
def test_one_gradient_alone_is_the_same_as_among_all(asked: str) -> None:
    g = operands(SMALL, torch.float64)
    whole = results(g, mix_glu(*g))
    alone = g._replace(**{n: getattr(g, n).detach() for n in NAMES if n != asked})
    assert torch.equal(results(alone, mix_glu(*alone))[f"d{asked}"], whole[f"d{asked}"])


def test_an_empty_slot_hides_infinities_and_nan() -> None:
    g = operands(Case(4, 6, (2, 2), 2), torch.float64)
    with torch.no_grad():
        g.U[0], g.V[1] = torch.inf, torch.nan
    g.ids[:2, 0], g.ids[:2, 1] = -1, 2
    out = results(g, mix_glu(*g))
    for what, x in out.items():
        assert torch.isfinite(x).all(), what
    for what in ("hbar", "H2", "dU", "dV", "dH1", "dH3", "dweights"):
        assert not out[what][:2].any(), what


@pytest.mark.parametrize("case", [SMALL._replace(tokens=0), SMALL._replace(slots=0), SMALL._replace(width=0)])
def test_nothing_in_gives_zeros_out(case: Case) -> None:
    g = operands(case, torch.float32)
    for what, x in results(g, mix_glu(*g)).items():
        assert not x.any(), what
        assert x.shape == ((case.tokens, 5) if what == "H2" else getattr(g, "U" if what == "hbar" else what[1:]).shape)


class _Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


def test_no_tensor_has_a_slot_axis_and_the_width() -> None:
    case = Case(24, 96, (2,) * 4, 4)
    g = operands(case, torch.float32, wants_grad=False)
    with _Largest() as seen:
        hbar, H2 = glu_eager.forward(g)
        glu_eager.backward(g, hbar, H2, [True] * 8)
    assert 0 < seen.elements < 2 * case.tokens * case.width


def test_autocast_does_not_round_what_was_given_in_float32() -> None:
    g = operands(SMALL, torch.float32)
    plain = results(g, mix_glu(*g))
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(g, mix_glu(*g))
    for what, x in cast.items():
        assert torch.equal(x, plain[what]), what


def test_opcheck_passes_for_both_directions() -> None:
    for case in (SMALL, SMALL._replace(absent=("H1", "B1", "A2"))):
        g = operands(case, torch.float32)
        torch.library.opcheck(mix_glu_op, tuple(g))
        out = [x.detach() for x in mix_glu(*g)]
        plain = operands(case, torch.float32, wants_grad=False)
        for needs in ([True] * 8, [False, True] * 4):
            torch.library.opcheck(mix_glu_backward_op, (*out, *plain, needs))


def test_fullgraph_compile_makes_one_graph_for_any_number_of_tokens() -> None:
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(mix_glu, fullgraph=True, dynamic=True, backend=graphs)
    for tokens in (17, 33, 5):
        g = operands(SMALL._replace(tokens=tokens), torch.float32)
        plain = results(g, mix_glu(*g))
        for what, x in results(g, compiled(*g)).items():
            assert torch.equal(x, plain[what]), what
    assert graphs.frame_count == 1


BAD = {
    "an unknown activation": ({"act": "swish"}, "act 'swish'"),
    "an activation nearly right": ({"act": "gelu-tanh"}, "did you mean 'gelu_tanh'"),
    "three dimensions": ({"U": torch.zeros(1, 5, 6)}, "flatten the tokens"),
    "V too narrow": ({"V": torch.zeros(5, 4)}, "V of shape (5, 4), expected (5, 6)"),
    "too few rows of H1": ({"H1": torch.zeros(4, 5)}, "H1 of shape (4, 5), expected (5, 5)"),
    "B transposed": ({"B3": torch.zeros(5, 6)}, "B3 of shape (5, 6), expected (6, 5)"),
    "H without B": ({"B1": None}, "H1 and B1"),
    "ids that are floats": ({"ids": torch.zeros(5, 2)}, "ids of torch.float32, expected integers"),
    "integer weights": ({"weights": torch.zeros(5, 2, dtype=torch.int64)}, "weights of torch.int64"),
    "another dtype of V": ({"V": torch.zeros(5, 6).half()}, "the dtype of U"),
    "another device": ({"A2": torch.zeros(5, 6, device="meta")}, "A2 on meta, expected cpu"),
    "a scale too short": ({"scale2": torch.ones(4)}, "scale2 of shape (4,), expected (5,)"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_wrong_argument_is_named(fault: str) -> None:
    changed, words = BAD[fault]
    g = operands(SMALL, torch.float32)._replace(**changed)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        mix_glu(*g)
    assert words in str(caught.value)


def test_more_than_128_ranks_are_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="129 ranks side by side, expected at most 128; use expand_slots"):
        mix_glu(*operands(Case(2, 4, (128, 1), 1), torch.float32))
