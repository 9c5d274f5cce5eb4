"""Random configs: well-typed ones of every combination, and junk."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import assume

from molora.config import BalanceConfig, GateConfig, MoloraConfig, Placement, RouterConfig
from molora.errors import ConfigError
from molora.initialisers import INITIALISERS
from molora.recipes.check import entry_faults
from molora.routers import BALANCES

STARTS = [name for name, entry in INITIALISERS.items() if not entry.instead]
per_layer = st.one_of(st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=2).map(tuple))
few = st.integers(1, 3)


def built(cls: Any, **values: Any) -> Any:
    """An instance, or no example at all where the config refuses the combination."""
    try:
        return cls(**values)
    except ConfigError:
        assume(False)


@st.composite
def gates(draw: st.DrawFn) -> GateConfig:
    how = draw(st.sampled_from(("dense", "top_k", "top_p")))
    chosen = how == "top_k"
    return built(
        GateConfig,
        activation=draw(st.sampled_from(("softmax",) if how == "top_p" else ("softmax", "sigmoid", "identity"))),
        top_k=draw(st.one_of(few, st.lists(few, min_size=1, max_size=2).map(tuple))) if how == "top_k" else None,
        top_p=draw(st.sampled_from((0.3, 1.0))) if how == "top_p" else None,
        temperature=draw(st.sampled_from((1.0, 0.5, 3.0))),
        renormalize=draw(st.sampled_from(("none", "one", "top_k", "softmax"))) if chosen else "none",
        hard_weight=draw(st.sampled_from(("prob", "prob", "one", "ste"))) if chosen else "prob",
        partition=draw(st.sampled_from((1, 1, 2))),
        bias_in_weight=draw(st.booleans()) if chosen else False,
        jitter=draw(st.sampled_from((0.0, 0.1))),
        capacity=draw(st.sampled_from((None, None, 1, 3))) if chosen else None,
    )


def balances() -> st.SearchStrategy[BalanceConfig]:
    return st.builds(
        BalanceConfig,
        kind=st.sampled_from(list(BALANCES)),
        coef=st.sampled_from((0.0, 0.1)),
        scope=st.sampled_from(("sequence", "batch")),
        pooling=st.sampled_from(("router", "layer", "model")),
        count=st.sampled_from(("argmax", "picks", "slots")),
        factor=st.sampled_from(("experts", "one")),
        reduction=st.sampled_from(("mean", "sum")),
        mask_padding=st.booleans(),
        shift=st.booleans(),
        rate=st.sampled_from((0.0, 0.01)),
    )


@st.composite
def placements(draw: st.DrawFn, select: str, scope: str, unit: str) -> Placement:
    kinds = {"model": ("hidden",), "block": ("linear",), "module": ("linear", "linear", "fixed")}[scope]
    kind = draw(st.sampled_from(kinds))
    router = built(
        RouterConfig,
        kind=kind,
        scope=scope,
        bias=draw(st.booleans()),
        init_std=draw(st.sampled_from((None, 0.02))),
        dropped_input=draw(st.booleans()) if unit == "linear" else False,
        train=draw(st.booleans()),
        depth=draw(few),
        size=draw(st.integers(1, 16)),
        dropout=draw(st.sampled_from((0.0, 0.2))),
        layerwise=draw(st.booleans()),
        scaling_pass_value=draw(st.sampled_from((0.0, 0.3, -1.0))),
    )
    return built(
        Placement,
        unit=unit,
        select=select,
        num_experts=draw(st.integers(1, 5) if scope == "model" else per_layer),
        r=draw(per_layer),
        rank_one=draw(st.booleans()) if scope != "model" else False,
        lora_alpha=draw(st.sampled_from((1, 16.0))),
        lora_dropout=draw(st.sampled_from((0.0, 0.2))),
        scale_by=draw(st.sampled_from(("r", "sqrt_r", "top_k"))),
        global_scale=draw(st.sampled_from((1.0, 0.5))),
        init_lora_weights=draw(st.sampled_from(STARTS)),
        router=router,
        gate=draw(gates()),
        balance=tuple(draw(st.lists(balances(), max_size=2))) if kind != "fixed" else (),
        train_experts=draw(st.booleans()),
        sampled=draw(st.booleans()),
    )


@st.composite
def configs(draw: st.DrawFn) -> MoloraConfig:
    """A whole config of one of the shapes that make sense."""
    shape = draw(
        st.sampled_from(
            (
                [("all", "module", "linear")],
                [("all", "model", "linear")],
                [("ffn", "block", "ffn")],
                [("ffn", "block", "ffn"), ("rest", "module", "linear")],
                [("ffn", "block", "linear"), ("rest", "module", "linear")],
                [("ffn", "module", "linear"), ("rest", "module", "linear")],
                [("rest", "module", "linear")],
                [("rest", "model", "linear")],
            )
        )
    )
    config = built(
        MoloraConfig,
        recipe="any",
        placements=tuple(draw(placements(select, scope, unit)) for select, scope, unit in shape),
        target_modules=draw(st.sampled_from(("all-linear", "all-linear", ("q_proj", "down_proj"), r".*\.1\..*_proj"))),
        exclude_modules=draw(st.sampled_from(((), ("k_proj",)))),
        layers_to_transform=draw(st.sampled_from(((), (1,)))),
        modules_to_save=draw(st.sampled_from(((), ("lm_head",)))),
        rank_pattern=draw(st.sampled_from(((), (("q_proj", 3),)))),
        alpha_pattern=draw(st.sampled_from(((), (("down_proj", 2.5),)))),
        kernel=draw(st.sampled_from(("auto", "torch", "loop"))),
    )
    assume(not entry_faults(config))
    return config


# Well-typed values of every field that decides how the parts fit together.
OTHERS: dict[str, tuple[Any, ...]] = {
    "unit": ("linear", "ffn"), "select": ("all", "ffn", "rest"), "num_experts": (1, 4, [2, 3]), "r": (1, 6, [4, 2]),
    "rank_one": (True, False), "scale_by": ("r", "top_k"), "kind": ("linear", "hidden", "fixed"),
    "scope": ("module", "block", "model"), "dropped_input": (True,), "activation": ("softmax", "sigmoid", "identity"),
    "top_k": (None, 1, 2, [1, 2]), "top_p": (None, 0.5), "renormalize": ("none", "one", "top_k", "softmax"),
    "hard_weight": ("prob", "one", "ste"), "partition": (1, 2, 3), "bias_in_weight": (True, False), "jitter": (0.2,),
    "capacity": (None, 2), "balance": ([],), "layerwise": (True, False), "layers_to_transform": ([0], [1]),
}  # fmt: skip


@st.composite
def neighbours(draw: st.DrawFn) -> dict[str, Any]:
    """A config as a dict, with one or two fields changed to other values of their type."""
    raw = draw(configs()).to_dict()
    places = [
        (part, name)
        for p in raw["placements"]
        for part in (p, p["router"], p["gate"])
        for name in part
        if name in OTHERS
    ]
    for part, name in draw(st.lists(st.sampled_from(places), min_size=1, max_size=2)):
        part[name] = draw(st.sampled_from(OTHERS[name]))
    return raw


JUNK: tuple[Any, ...] = (
    None, True, False, -1, 0, 3, 2**40, 10**400, 10**5000, 0.5, -0.5, 1e300, float("nan"), float("inf"), "", "x",
    "top_k", b"x", (), [], {}, [0], [1, "a"], [None], (1, 2, 3), {"a": 1}, [[1, 2], [3]], {1: 2}, {2, 3}, object(),
)  # fmt: skip
junk = st.sampled_from(JUNK)
