"""LoRA on a base's own experts: what is refused, what a run of it is planned as, and training it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import molora
from molora.errors import ConfigError, MoloraError, TargetError
from molora.training.plan.counts import activation_widths, dispatched, kinds_of, site_groups
from molora.training.trainer import Trainer
from tests.support import behaviours, tiny
from tests.support.families import base, inputs
from tests.support.traits import having

BOTH = ["experts.gate_up_proj", "experts.down_proj"]

# ---------------------------------------------------------------------------------------------------- refusals

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"target_parameters": ["gate_up_pro"]}, "no parameter is named 'gate_up_pro'.*gate_up_proj.*three dim"),
    "a_linear": ({"target_parameters": ["q_proj.weight"]}, "q_proj.weight: is the weight of a Linear.*target_modules"),
    "a_norm": ({"target_parameters": ["input_layernorm.weight"]}, "got 1 dimensions, expected 3"),
    "a_router": ({"target_parameters": ["mlp.gate.weight"]}, "got 2 dimensions, expected 3"),
    "dropout": ({"lora_dropout": 0.1}, r"got lora_dropout=0\.1, expected 0: B A is added to the weight itself"),
    "no_layer": ({"exclude_modules": ["mlp.experts"]}, "layers_to_transform and exclude_modules leave none of them"),
    "pattern": ({"rank_pattern": {"up_proj": 3}}, "rank_pattern: no adapted linear is named 'up_proj'.*gate_up_proj"),
    "saved": ({"modules_to_save": ["experts"]}, "experts is also adapted"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_named(case: str) -> None:
    options, words = REFUSED[case]
    model = base("mixtral")
    before = behaviours.snapshot(model)
    with pytest.raises(MoloraError, match=words):
        molora.convert(model, "lora", **{"r": 4, "target_parameters": BOTH, **options})
    assert behaviours.snapshot(model) == before


@pytest.mark.parametrize("recipe", having(lambda t: not t.merges))
def test_a_mixture_has_no_place_inside(recipe: str) -> None:
    more = {"adapters": {"a": "x", "b": "y"}} if recipe in tiny.IMPORTING else {}
    with pytest.raises(ConfigError, match="expected 'lora': the base's experts run as one function of their weights"):
        molora.convert(base("mixtral"), recipe, target_parameters=BOTH, **more)


def quantised(p: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(p.to(torch.float8_e4m3fn), requires_grad=False)


def partitioned(p: nn.Parameter) -> nn.Parameter:
    p.ds_id, p.data = 0, torch.empty(0)  # type: ignore[attr-defined]
    return p


@pytest.mark.parametrize(("change", "words"), [(quantised, "quantised experts stay"), (partitioned, "is partitioned")])
def test_weights_that_are_not_plain_and_whole(change: Any, words: str) -> None:
    model = base("mixtral")
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = change(experts.down_proj)
    with pytest.raises(TargetError, match=rf"layers\.1\.mlp\.experts\.down_proj: .*{words}"):
        molora.convert(model, "lora", target_parameters=BOTH)


def test_weights_that_an_engine_takes_away_later() -> None:
    model = molora.convert(base("mixtral"), "lora", target_parameters=BOTH)
    partitioned(model.model.layers[0].mlp.experts.base_layer.gate_up_proj)
    with pytest.raises(MoloraError, match=r"gate_up_proj: the base's experts are not whole .*train with ZeRO-1 or 2"):
        model(**inputs("mixtral"))


def test_a_parameter_of_two_modules() -> None:
    model = base("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.down_proj = first.down_proj
    with pytest.raises(TargetError, match=r"layers\.0\.mlp\.experts\.down_proj: is shared by .*layers\.1"):
        molora.convert(model, "lora", target_parameters=BOTH)


class Reads(nn.Module):
    """A block that multiplies by its experts' weights itself, and never calls the module that holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(8, 4), nn.Module()
        self.experts.stack = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.einsum("bsi,eoi->bso", self.embed(input_ids), self.experts.stack)


def test_a_module_that_is_read_past_its_forward() -> None:
    with pytest.raises(TargetError, match=r"experts\.stack: the model reads it without calling experts"):
        molora.convert(Reads(), "lora", target_modules=[], target_parameters=["stack"])


def test_only_some_layers_and_one_parameter() -> None:
    """Beside the linears of the same layers; ranks may differ by layer, as those of linears."""
    options = {"r": (2, 4), "layers_to_transform": [1], "target_modules": ["q_proj"]}
    sites = molora.convert(base("gpt_oss"), "lora", target_parameters=["experts.down_proj"], **options)._molora.sites
    found = [(s.path, s.role, s.ranks, s.stacked() if s.role == "parameter" else ()) for s in sites]
    layer = "model.layers.1"
    assert found == [
        (f"{layer}.self_attn.q_proj", "linear", (4,), ()),
        (f"{layer}.mlp.experts.down_proj", "parameter", (4,), (4, 48, 32)),
    ]


# ------------------------------------------------------------------------------------- counting and planning


def test_sites_and_parameters_of_shapes_alone() -> None:
    """On the meta device, as ``molora train --dry-run`` plans: E r (in + out) a parameter; copies are activations."""
    real = molora.convert(base("mixtral"), "lora", r=4, target_parameters=BOTH)
    model, without = base("mixtral").to("meta"), molora.convert(base("mixtral").to("meta"), "lora", r=4)
    model.set_experts_implementation("batched_mm")  # the one that runs on the meta device in float32
    molora.convert(model, "lora", r=4, target_parameters=BOTH)
    assert model._molora.sites == real._molora.sites
    assert tiny.output(model, {"input_ids": inputs("mixtral")["input_ids"].to("meta")}).is_meta
    kinds = {k.name: (k.parameters, k.trained) for k in kinds_of(model)}
    hidden, middle, E, r, layers = 32, 48, 4, 4, 2
    attention = r * 4 * hidden  # q, k, v and o read or write the model's width
    assert kinds["A"] == ((attention + E * r * (hidden + middle)) * layers,) * 2
    assert kinds["B"] == ((r * (2 * 32 + 2 * 16) + E * r * (2 * middle + hidden)) * layers,) * 2
    assert kinds["base"] == (sum(p.numel() for p in base("mixtral").parameters()), 0)
    assert real.get_nb_trainable_parameters()[0] == kinds["A"][0] + kinds["B"][0]
    group = next(g for g in site_groups(model) if g.role == "parameter")
    assert (group.names, group.sites, group.routers) == (("gate_up_proj", "down_proj"), 4, 0)
    widths = activation_widths(model)
    assert widths.stacked == layers * 3 * E * hidden * middle
    assert widths.largest_stack == math.prod((E, 2 * middle, hidden))
    assert widths.ranks == layers * 4 * r  # stacked experts have no values of ranks
    assert dispatched(model) == 0
    more = widths.bytes(1, False) - activation_widths(without).bytes(1, False)
    assert more == 4 * (widths.stacked + widths.largest_stack)


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("cls", [tf.Trainer, Trainer])
def test_trainers_train_and_save_them(cls: Any, tmp_path: Path) -> None:
    model = molora.convert(base("mixtral"), "lora", r=4, target_parameters=BOTH)
    rows = [{"input_ids": [3, 7, 11, 5], "labels": [3, 7, 11, 5]}] * 4
    settings = {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 2, "report_to": [], "disable_tqdm": True}
    arguments = tf.TrainingArguments(str(tmp_path), use_cpu=True, gradient_checkpointing=True, **settings)
    trainer = cls(model, arguments, train_dataset=rows)
    trainer.train()
    trained = tiny.output(model.eval(), inputs("mixtral"))
    assert not torch.equal(trained, tiny.output(base("mixtral"), inputs("mixtral")))
    loaded = molora.load(base("mixtral"), tmp_path / "checkpoint-2")
    assert torch.equal(tiny.output(loaded, inputs("mixtral")), trained)
    saved = json.loads((tmp_path / "checkpoint-2" / "adapter_config.json").read_text())
    assert saved["config"]["target_parameters"] == BOTH
