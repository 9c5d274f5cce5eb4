"""MoE-PEFT's folders with a router on each linear: they compute what that code computes, or say why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import molora
from molora.errors import AdapterError
from tests.interop.test_foreign import check
from tests.support import foreign_folders as write
from tests.support import foreign_oracles as oracle
from tests.support import tiny
from tests.support.foreign_cases import refused
from tests.support.tolerances import close

Weights = Callable[[Tensor], Tensor]
CASES: dict[str, tuple[str, dict[str, Any], Weights]] = {
    "mola": ("mola", {}, lambda p: oracle.top(p, 2)),
    "mola, one choice": ("mola", {"top_k": 1}, lambda p: oracle.top(p, 1)),
    "mola, rank-stabilised": ("mola", {"use_rslora": True}, lambda p: oracle.top(p, 2)),
    "loramoe": ("loramoe", {}, lambda p: p),
    "loramoe, rank-stabilised": ("loramoe", {"use_rslora": True}, lambda p: p),
}


def written(folder: Path, kind: str, tensors: write.Tensors, **config: Any) -> Path:
    return write.write(folder, write.moe_peft_config(kind, **config), tensors, "adapter_model.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_mixture_computes_what_that_code_does(case: str, tmp_path: Path) -> None:
    kind, own, weights = CASES[case]
    tensors = write.moe_peft(kind)
    config = write.moe_peft_config(kind, **own)
    write.write(tmp_path / "foreign", config, tensors, "adapter_model.bin")
    model = molora.load(tiny.base_model("llama"), tmp_path / "foreign", allow_pickle=True)
    scale = config["lora_alpha"] / (math.sqrt if own.get("use_rslora") else float)(config["r"])
    check(model, oracle.moe_peft(tensors, kind, weights, scale), tmp_path)
    assert model._molora.config.recipe == kind
    assert model._molora.config.placements[0].lora_dropout == 0.05


def test_some_linears_of_some_layers(tmp_path: Path) -> None:
    tensors = {k: t for k, t in write.moe_peft("loramoe").items() if ".0.mlp.down" in k or ".1.self_attn.q" in k}
    model = molora.load(tiny.base_model("llama"), written(tmp_path / "x", "loramoe", tensors))
    gone = {k: torch.zeros_like(t) if "lora_B" in k and k not in tensors else t
            for k, t in write.moe_peft("loramoe").items()}  # fmt: skip
    check(model, oracle.moe_peft(gone, "loramoe", lambda p: p, 3.0), tmp_path)
    assert {s.path for s in model._molora.sites} == {"model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("kind", ["mola", "loramoe"])
def test_training_goes_on_with_the_loss_of_that_code(kind: str, tmp_path: Path) -> None:
    """The balance loss of "mola" pools all routers: E sum_e f_e P_e, f over all choices; "loramoe" has none."""
    inputs = {"input_ids": oracle.IDS, "labels": oracle.IDS}
    folder = written(tmp_path, kind, write.moe_peft(kind), lora_dropout=0.0)
    model = molora.load(tiny.base_model("llama"), folder, trainable=True).train()
    with molora.record_routing(model) as tape:
        out = model(**inputs)
    out.loss.backward()
    routers = {n: p for n, p in model.named_parameters() if "router" in n}
    assert len(routers) == (14 if kind == "mola" else 6)
    assert all(p.grad is not None and p.grad.any() for p in routers.values())
    added = out.loss.detach() - model.eval()(**inputs).loss.detach()
    if kind == "loramoe":
        assert added == 0
        return
    records = [r for own in tape.values() for r in own]
    P_E = torch.cat([r.probs for r in records]).mean(0)
    f_KE = torch.cat([torch.nn.functional.one_hot(r.ids, 3) for r in records]).float().mean(0)
    close(added, 1e-3 * 3 * (f_KE * P_E).sum(), "difference_of_losses")


def test_magnitudes_that_were_never_saved_are_told(tmp_path: Path) -> None:
    for kind in ("mola", "loramoe"):
        folder = written(tmp_path / kind, kind, write.moe_peft(kind), use_dora=True)
        with pytest.warns(UserWarning, match="trained with use_dora, but without its magnitudes"):
            molora.load(tiny.base_model("llama"), folder)


GATE = "loramoe.layers.0.self_attn.q_proj.moe_gate.weight"
EXPERTS = {
    f"loramoe.layers.0.self_attn.q_proj.experts.{e}.lora_{x}.weight": torch.ones(2, 2) for e in range(3) for x in "AB"
}
FAULTS: dict[str, tuple[str, Callable[[write.Tensors], object], dict[str, Any], str]] = {
    "another strategy": ("mola", dict, {"routing_strategy": "mixlora-switch"}, "expected 'mola'"),
    "no number of experts": ("mola", dict, {"num_experts": "3"}, "num_experts: got 3, expected a whole number"),
    "another number of experts": ("mola", dict, {"num_experts": 2}, "one too many for 2 experts"),
    "more choices than experts": ("mola", dict, {"top_k": 4}, "its config is not valid.*top_k"),
    "another rank": ("loramoe", dict, {"r": 3}, "expected rank 3"),
    "a lost router": ("mola", lambda t: t.pop("mola.layers.1.mlp.up_proj.moe_gate.weight"), {}, "only one of router"),
    "a router of another size": (
        "loramoe",
        lambda t: t.update({"loramoe.layers.0.mlp.up_proj.moe_gate.weight": torch.ones(4, 32)}),
        {},
        r"the router has shape \(4, 32\), the config says num_experts=3",
    ),
    "a head": ("mola", lambda t: t.update(classifier=torch.ones(2, 32)), {}, "got the tensor 'classifier'"),
    "another prefix": ("mola", lambda t: t.update({GATE: torch.ones(3, 32)}), {}, "under 'mola'"),
    "a router on attention": (
        "loramoe",
        lambda t: t.update({GATE: torch.ones(3, 32), **EXPERTS}),
        {},
        "q_proj: got a router there, expected 'loramoe' to have routers on feed-forward linears",
    ),
    "plain LoRA in the block": (
        "loramoe",
        lambda t: t.update({f"loramoe.layers.0.mlp.up_proj.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}),
        {},
        "up_proj: got a router there|up_proj: got a plain LoRA there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_what_does_not_fit_together_is_refused(case: str, tmp_path: Path) -> None:
    kind, edit, config, words = FAULTS[case]
    tensors = write.moe_peft(kind)
    edit(tensors)
    refused(written(tmp_path, kind, tensors, **config), AdapterError, f"(?s){words}")
