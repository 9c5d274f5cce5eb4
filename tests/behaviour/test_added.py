"""A thing added by one file from outside, with one line for its table, lives as molora's own do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import molora
from molora.config import MoloraConfig
from molora.data.formats import FORMATS
from molora.data.sources import read_jsonl
from molora.errors import AdapterError, ConfigError
from molora.recipes import RECIPES
from tests.support import life, tiny
from tests.support.added_things import FILES, added
from tests.support.tolerances import close

CONFIGS: dict[str, Callable[[], MoloraConfig]] = {
    "cosine_router": lambda: life.smallest("router", "cosine"),
    "threshold_gate": lambda: life.smallest("gate", "threshold"),
    "task_margin_rule": lambda: life.smallest("balance", "task_margin"),
    "sparse_penalty": lambda: life.smallest("penalty", "sparse"),
    "diagonal_bank": lambda: life.smallest("bank", "diagonal"),
    "banded_initialiser": lambda: life.smallest("initialiser", "banded"),
    "pair_recipe": lambda: RECIPES["pair"](),
    "whole_recipe": lambda: RECIPES["whole"](),
}
NEEDS = {"whole_recipe": [path.stem for path in FILES]}  # of other files


def test_every_file_is_tried() -> None:
    assert {path.stem for path in FILES} == {*CONFIGS, "questions_format", "own_folder"}


@pytest.mark.parametrize("stage", life.STAGES)
@pytest.mark.parametrize("name", CONFIGS)
def test_it_lives_alone(name: str, stage: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    with added(tmp_path / "files", *NEEDS.get(name, [name])):
        life.STAGES[stage](CONFIGS[name](), tmp_path / "life")


def test_options_of_its_own_are_checked_and_read_back(tmp_path: Path) -> None:
    with added(tmp_path, "cosine_router"):
        from cosine_router import CosineConfig

        config = life.mixture(life.PLAIN.replace(router=CosineConfig(sharpness=2.0)))
        again = MoloraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert again.placements[0].router.sharpness == 2.0
        with pytest.raises(ConfigError, match="sharpness: got 0.0, expected a value of at least"):
            CosineConfig(sharpness=0.0)
        wrong = config.to_dict()
        wrong["placements"][0]["router"]["depth"] = 3
        with pytest.raises(ConfigError, match="unknown entry 'depth'"):
            MoloraConfig.from_dict(wrong)
        linear = life.mixture(life.PLAIN.replace(router=CosineConfig(kind="linear")))
        with pytest.raises(ConfigError, match="got options CosineConfig for kind='linear', expected RouterConfig"):
            molora.convert(life.base(), linear)


def test_a_gate_that_asks_for_more_than_its_router_gives_is_refused(tmp_path: Path) -> None:
    with added(tmp_path, "threshold_gate"):
        from threshold_gate import ThresholdConfig

        wide = life.smallest("router", "hidden").placements[0]
        config = life.mixture(wide.replace(gate=ThresholdConfig()))
        with pytest.raises(ConfigError, match="'threshold' takes 1 more numbers a token, .* 'hidden' does not give"):
            molora.convert(life.base(), config)


def test_a_choice_that_a_gate_does_not_make_is_refused(tmp_path: Path) -> None:
    with added(tmp_path, "threshold_gate"):
        from threshold_gate import ThresholdConfig

        config = life.mixture(life.PLAIN.replace(gate=ThresholdConfig(top_k=2)))
        with pytest.raises(ConfigError, match="top_k: got 2 for a gate of kind 'threshold', which does not choose by"):
            molora.convert(life.base(), config)


def test_a_folder_whose_thing_is_not_there_is_refused(tmp_path: Path) -> None:
    with added(tmp_path, "cosine_router"):
        life.start(life.smallest("router", "cosine")).save_pretrained(tmp_path / "saved")
    with pytest.raises(AdapterError, match="'cosine'"):
        molora.load(life.base(), tmp_path / "saved")


def test_a_start_of_its_own_is_an_option_of_every_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="init_lora_weights: got 'banded', expected one of"):
        molora.recipes.mola(init_lora_weights="banded")
    with added(tmp_path, "banded_initialiser"):
        assert molora.recipes.mola(init_lora_weights="banded").placements[0].init_lora_weights == "banded"
        with pytest.raises(ConfigError, match="'banded': A in bands of the input"):
            molora.recipes.mola(init_lora_weights="bnded")


def test_a_data_format_is_read_trained_on_and_names_its_faults(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    file = tmp_path / "rows.jsonl"
    with added(tmp_path / "files", "questions_format"):
        row = FORMATS["questions"].tiny()
        file.write_text("".join(json.dumps(row) + "\n" for _ in range(3)))
        records = read_jsonl(file)
        assert len(records) == 3
        assert [m["content"] for m in records[0].messages] == [row["question"], row["answer"]]
        file.write_text(json.dumps(row) + "\n" + json.dumps({"question": "Why?"}) + "\n")
        with pytest.raises(ConfigError, match=r"rows.jsonl:2.*'answer': got None, expected a non-empty text"):
            read_jsonl(file)


def test_a_foreign_format_is_loaded_and_names_its_faults(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    folder = tmp_path / "foreign"
    folder.mkdir()
    g = torch.Generator().manual_seed(0)
    path, A, B = "model.layers.0.self_attn.q_proj", torch.randn(2, 32, generator=g), torch.randn(32, 2, generator=g)
    save_file({f"{path}/down": A, f"{path}/up": B}, folder / "lora.safetensors")
    (folder / "lora.json").write_text('{"rank": 2, "alpha": 4}')
    with added(tmp_path / "files", "own_folder"):
        model = molora.load(life.base(), folder).eval()
        expected = life.base()
        with torch.no_grad():
            expected.get_submodule(path).weight += 2.0 * B @ A
        close(tiny.output(model, life.BATCH), tiny.output(expected, life.BATCH), "same_math_fp32")
        (folder / "lora.json").write_text('{"rank": 2}')
        base: Any = life.base()
        with pytest.raises(AdapterError, match="cannot be read as a LoRA of its own format"):
            molora.load(base, folder)
        assert type(base) is type(life.base())
