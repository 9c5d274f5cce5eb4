"""Foreign folders changed at random: what loads computes finite numbers, all else is one short error of molora's."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import MoloraError
from tests.support.behaviours import snapshot
from tests.support.foreign_cases import FORMATS
from tests.support.tiny import base_model

SEEDS, FOLDERS = 2, 50  # of each format; some seconds in all
VALUES: list[Any] = [None, True, 0, 1, -5, 10**17, 1e308, 0.5, "", "8", "a" * 300, "\0", [], [[1]], ["q_proj"], {}]
VALUES += [{"a": 1}, {"r": -1}, [3, 2], {"math": "x", "code": "y"}]
NAMES = [
    "r", "lora_alpha", "peft_type", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "bias", "top_k",
    "target_parameters", "num_experts", "top_p", "temperature", "routing_strategy", "expert_lora", "lora_dropout",
    "adapters", "hidden_size", "xlora_depth", "xlora_size", "top_k_lora", "softmax_temperature", "layerwise_scalings",
    "enable_softmax", "enable_softmax_topk", "scaling_pass_value", "global_scaling_weight", "act_fn", "use_mean_pool",
    "enable_relu_and_dropout", "xlora_dropout_p", "use_trainable_adapters", "init_lora_weights",
]  # fmt: skip


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(p for p in folder.rglob(f"*{ending}") if p.is_file())


def change_config(folder: Path, rng: random.Random) -> None:
    """Another value of any type for one entry, or none."""
    if found := files(folder, ".json"):
        path = rng.choice(found)
        config = json.loads(path.read_text())
        name = rng.choice([*config, *NAMES])
        config[name] = rng.choice(VALUES)
        path.write_text(json.dumps({k: v for k, v in config.items() if k != name or rng.random() < 0.9}))


def change_tensor(folder: Path, rng: random.Random) -> None:
    """One tensor lost, renamed, written twice, of another form, dtype or size, or no longer finite."""
    path = rng.choice(files(folder, ".safetensors"))
    tensors = load_file(path)
    name = rng.choice(sorted(tensors))
    t = tensors.pop(name)
    changed: list[dict[str, torch.Tensor]] = [
        {},
        {name + ".x": t},
        {name.replace(".0.", ".00."): 2 * t, name: t},
        {name.removeprefix("base_model.model."): t, name: 2 * t},
        {"weight": t},
        {name: t.reshape(*reversed(t.shape))},
        {name: t.reshape(-1)},
        {name: t.sum()},
        {name: t[:1].clone()},
        {name: t.new_zeros(0)},
        {name: t.double() * 1e300},
        {name: t.int()},
        {name: t / 0},
    ]
    save_file(tensors | rng.choice(changed), path)


def tear(folder: Path, rng: random.Random) -> None:
    """A file with its end missing, or some bytes of its beginning changed."""
    path = rng.choice(files(folder, ""))
    raw = bytearray(path.read_bytes())
    if rng.random() < 0.3:
        raw = raw[: rng.randrange(len(raw))]
    for _ in range(3 if raw else 0):
        raw[rng.randrange(min(len(raw), 2000))] = rng.randrange(256)
    path.write_bytes(raw)


CHANGES: tuple[Callable[[Path, random.Random], None], ...] = (change_config, change_tensor, tear)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.filterwarnings("ignore:.*(magnitudes|normalised for each token)")
def test_a_changed_folder_loads_or_is_refused(form: str, seed: int, tmp_path: Path):
    make, _, more = FORMATS[form]
    make(tmp_path / "good")
    rng, base = random.Random(f"{form} {seed}"), base_model("llama", trainable=True)
    before, refusals = snapshot(base), 0
    for i in range(FOLDERS):
        folder = Path(shutil.copytree(tmp_path / "good", tmp_path / str(i)))
        rng.choice(CHANGES)(folder, rng)
        said = attempt(base, folder, **more)
        if said:
            assert str(tmp_path) in said or said.startswith("load:")
            assert len(said) < 2500
            assert snapshot(base) == before
            refusals += 1
        else:
            with torch.no_grad():
                assert base(input_ids=torch.arange(3, 9)[None]).logits.isfinite().all()
            base = base_model("llama", trainable=True)
            before = snapshot(base)
    assert refusals > FOLDERS / 4


def attempt(base: Any, folder: Path, **more: Any) -> str:
    """What molora says against the folder; any other exception goes through and fails the test."""
    try:
        molora.load(base, folder, **more)
    except MoloraError as e:
        return str(e)
    return ""
