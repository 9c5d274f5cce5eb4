"""The plan of a dry run: counts are exact, formulas agree with real runs, every shipped config loads and plans."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml

import molora
from molora.training.arguments import ModelArguments, read_arguments
from molora.training.plan.costs import Activations, Weights, memory, traffic
from molora.training.plan.counts import activation_widths, weights_of
from molora.training.plan.dry_run import DryRun, dry_run
from molora.training.plan.overview import Batch, steps_of
from molora.training.plan.shapes import base_without_storage, known_shapes
from tests.support.tiny import arm, base_model, batch
from tests.training.test_counts import LAYERS, D, F

CONFIGS = Path(molora.__file__).parent / "training" / "configs"
FILES = sorted(path.name for path in CONFIGS.glob("*.yaml"))
LLAMA_2_7B = 6_738_415_616
ALL_LINEAR = 4 * 2 * D + 3 * (D + F)  # widths of a LLaMA-2-7B layer's seven linears, in and out


@functools.cache
def planned(name: str) -> DryRun:
    """The dry run of a shipped config on 8 GPUs."""
    return dry_run(read_arguments(CONFIGS / name), 8)


def counts(name: str) -> dict[str, int]:
    return {k.name: k.parameters for k in planned(name).plan.kinds}


# -------------------------------------------------------------------------------------------------------- the configs


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_config_loads_and_plans(name: str) -> None:
    found, values = planned(name), yaml.safe_load((CONFIGS / name).read_text())
    plan = found.plan
    assert plan.recipe == values["recipe"]
    assert plan.sites
    assert sum(k.trained for k in plan.kinds) > 0
    assert plan.batch.rows == plan.batch.micro * plan.batch.accumulation * 8
    totals = [m.gpu for m in plan.memory]
    assert totals[1:] == sorted(totals[1:], reverse=True)  # every stage takes less than the one before
    json.dumps(dataclasses.asdict(plan))
    notes = "\n".join(found.notes)
    files = [v for v in values["domains"].values() if not v.startswith("builtin:")]
    assert [v for v in files if f"= {v}" not in notes] == []
    assert (plan.rows is None) == bool(files)


def test_parameters_by_kind_are_the_published_numbers() -> None:
    assert counts("mixlora_llama2_7b.yaml")["base"] == LLAMA_2_7B
    mixlora = counts("mixlora_llama2_7b.yaml")
    assert (mixlora["A"] + mixlora["B"], mixlora["router"]) == (202_375_168, 1_048_576)
    mola = counts("mola_llama2_7b.yaml")
    assert mola["A"] + mola["B"] + mola["router"] == 105_635_840
    smora = counts("smora_llama2_7b.yaml")
    assert smora["A"] + smora["B"] == 64 * LAYERS * ALL_LINEAR == 159_907_840
    assert smora["router"] == smora["A"]
    llava = counts("llava_mole_llava15_7b.yaml")
    assert llava["A"] + llava["B"] == LAYERS * (3 * 32 * 3 * (D + F) + 4 * 32 * 2 * D)
    assert llava["router"] == LAYERS * 3 * (D + 1)
    assert llava["modules to save"] == (1024 * D + D) + (D * D + D)  # the projector's two linears
    meteora = counts("meteora_llama3_8b.yaml")
    assert (meteora["A"] + meteora["B"], meteora["router"]) == (587_202_560, 34_865_152)  # 28 adapters of rank 8


def test_a_head_for_all_layers_and_frozen_experts() -> None:
    plan = planned("xlora_zephyr_7b.yaml").plan
    head = (D * 2048 + 2048) + 6 * (2048 * 2048 + 2048) + (2048 + 1) * 9 * 7 * LAYERS
    assert [(k.name, k.trained) for k in plan.kinds] == [("base", 0), ("A", 0), ("B", 0), ("router", head)]
    assert [(g.sites, g.experts, g.ranks, g.choices) for g in plan.sites] == [(224, (9,), (144,), ())]


def test_sites_by_placement_and_role() -> None:
    groups = {g.role: g for g in planned("mixlora_llama3_8b.yaml").plan.sites}
    assert groups["up"].names == ("gate_proj", "up_proj")
    assert (groups["up"].sites, groups["up"].routers, groups["up"].ranks, groups["up"].choices) == (
        64,
        32,
        (128,),
        (2,),
    )
    assert (groups["linear"].sites, groups["linear"].experts, groups["linear"].ranks) == (128, (1,), (16,))
    assert planned("mola_llama2_7b.yaml").plan.sites[0].experts == (2, 4, 6, 8)


PUBLISHED = {
    "HuggingFaceH4/zephyr-7b-beta": 7_241_732_096,
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "llava-hf/llava-1.5-7b-hf": 7_063_427_072,
    "meta-llama/Llama-2-13b-hf": 13_015_864_320,
    "meta-llama/Llama-2-7b-hf": LLAMA_2_7B,
    "meta-llama/Meta-Llama-3-70B": 70_553_706_496,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
}


def test_known_shapes_have_the_published_sizes() -> None:
    models = {name: base_without_storage(ModelArguments(name)) for name in known_shapes()}
    assert {name: sum(p.numel() for p in m.parameters()) for name, m in models.items()} == PUBLISHED
    assert {(p.device.type, p.dtype) for m in models.values() for p in m.parameters()} == {("meta", torch.bfloat16)}


# ------------------------------------------------------------------------------------------------------- the formulas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_is_that_of_a_real_step(dtype: torch.dtype) -> None:
    """Bytes of weights, gradients and AdamW's moments after one step, on one device."""
    base = base_model("llama").to(dtype)
    model = arm(molora.convert(base, "mixlora", r=4, num_experts=4, modules_to_save=["lm_head"])).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    model(**batch("llama")).loss.backward()
    optimizer.step()
    real = memory(weights_of(model), 1, 0)[0]
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert real.base + real.adapters == sum(p.nbytes for p in model.parameters())
    assert real.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
    assert real.optimizer == sum(t.nbytes for t in moments)


HALF = Weights(base=800, largest_part=100, frozen=40, trained=80, frozen_count=10, trained_count=20, item=2)


def parts(gpus: int, cast: bool = False) -> list[tuple[int, ...]]:
    return [(m.base, m.adapters, m.gradients, m.optimizer, m.host) for m in memory(HALF, gpus, 7, cast)]


def test_zero_shards_the_state_then_the_gradients_then_the_base() -> None:
    assert parts(4) == [
        (800, 120, 80, 160, 0),  # float32 weights, gradients, two moments
        (800, 120, 80, 60, 0),  # 12 bytes of state for each of 20, over 4
        (800, 120, 20, 60, 0),
        (200 + 200, 120, 20, 60, 0),  # a quarter of the base, and two of its largest parts
        (200, 120, 20, 0, 200 + 60),
    ]
    assert parts(1)[3] == (800, 120, 80, 240, 0)  # the whole base is there once, not gathered on top
    assert {m.gpu - m.base - m.adapters - m.gradients - m.optimizer for m in memory(HALF, 4, 7)} == {7}


def test_bf16_halves_adapters_and_gradients_but_not_the_state() -> None:
    assert parts(4, cast=True)[1:3] == [(800, 60, 40, 60, 0), (800, 60, 10, 60, 0)]
    assert [parts(4, cast=True)[i] for i in (0, 3, 4)] == [parts(4)[i] for i in (0, 3, 4)]


def test_traffic_of_ring_algorithms() -> None:
    sent = dict(traffic(HALF, 4, 3))
    assert sent["ZeRO-0 (DDP)"] == sent["ZeRO-1"] == 2 * 0.75 * 80
    assert sent["ZeRO-2"] == (3 + 1) * 0.75 * 80  # scattered after each micro-step, gathered once
    assert sent["ZeRO-3"] == sent["ZeRO-2"] + 3 * 2 * 0.75 * 800
    assert dict(traffic(HALF, 4, 3, cast=True))["ZeRO-2"] == (3 + 1) * 0.75 * 40
    assert set(dict(traffic(HALF, 1, 3)).values()) == {0}


def saved_for_backward(model: Any, **inputs: torch.Tensor) -> int:
    """Bytes that one forward pass keeps for the backward pass, each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        seen.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(**inputs)
    return sum(t.untyped_storage().nbytes() for address, t in seen.items() if address not in own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        ("lora", {"r": 8}),
        ("mixlora", {"r": 8}),
        ("mixlora", {"r": 8, "lora_dropout": 0.05}),
        ("mola", {"r": 8, "num_experts": 4}),
        ("smora", {"r": 32}),
        ("llava_mole", {"r": 8}),
    ],
)
def test_the_estimate_of_activations_is_close(recipe: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    config = tf.LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=512,
    )
    model = molora.convert(tf.LlamaForCausalLM(config).to(dtype), recipe, **options).train()
    ids = torch.randint(0, 512, (2, 128))
    estimate = activation_widths(model).bytes(ids.numel(), checkpointing=False)
    assert estimate == pytest.approx(saved_for_backward(model, input_ids=ids, labels=ids), rel=0.15)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer_at_a_time() -> None:
    sizes = {"hidden": 16, "query": 16, "key_value": 8, "middle": 32, "vocabulary": 0}
    widths = Activations(layers=10, **sizes, ranks=100, routed=0, logits=0, dropped=0, item=2)
    whole, kept = (widths.bytes(1, checkpointing=c) for c in (False, True))
    assert kept == 10 * 2 * 16 + whole / 10


@pytest.mark.parametrize(
    ("rows", "epochs", "steps"), [(10, 1.0, 2), (13, 1.0, 3), (17, 2.0, 6), (17, 0.5, 2), (1, 1.0, 1)]
)
def test_steps_are_those_of_the_trainer(rows: int, epochs: float, steps: int, tmp_path: Path) -> None:
    args = tf.TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=epochs,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    data = [{"input_ids": [3, 4], "labels": [3, 4]}] * rows
    trainer = tf.Trainer(base_model("llama", trainable=True), args, train_dataset=data)
    trainer.train()
    assert trainer.state.global_step == steps_of(rows, Batch(3, 2, 1, 8), epochs, -1) == steps
    assert steps_of(rows, Batch(3, 2, 1, 8), epochs, 5) == 5
    assert steps_of(None, Batch(3, 2, 1, 8), epochs, -1) is None
