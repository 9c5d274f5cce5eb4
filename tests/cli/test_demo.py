"""The whole demo on a tiny model and a user's own domain files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from molora.cli import demo
from molora.errors import CheckpointError
from molora.eval.document import read_document
from molora.eval.scoring.fresh_process import Answers
from tests.support import tiny_text


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs on the same model and data."""
    folder = tmp_path_factory.mktemp("demo")
    shared = {
        "model_name_or_path": str(tiny_text.model_folder(folder / "model")),
        "dtype": "float32",
        "domains": tiny_text.domains(folder),
        "max_length": 48,
        "heldout": 6,
        "max_steps": 15,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    runs = {"mixlora": {"num_experts": 4, "top_k": 2, "r": 4}, "lora": {"r": 2, "lora_alpha": 4}}
    for recipe, options in runs.items():
        (folder / f"{recipe}.yaml").write_text(yaml.safe_dump({**shared, "recipe": recipe, "options": options}))
    return [folder / f"{recipe}.yaml" for recipe in runs]


@pytest.mark.slow
def test_demo_end_to_end(configs: list[Path], tmp_path: Path) -> None:
    said = io.StringIO()
    report = demo.run_demo(configs, tmp_path / "demo", [], Console(file=said, width=120))
    base, mixture, single = (report["runs"][name] for name in ("base", "mixlora", "lora"))
    assert report["not_below_base"] == {"mixlora": [], "lora": []}
    assert set(base["heldout_loss"]) == {"counting", "sums"}
    assert set(base["exact_match"]) == {"sums"}
    assert single["trainable_parameters"] == pytest.approx(mixture["trainable_parameters"], rel=0.1)
    assert "routing" not in single
    assert 0 < mixture["routing"]["p_value"] <= 1
    names = {p.name for p in (tmp_path / "demo").iterdir()}
    assert names == {"config.yaml", "eval", "lora", "metrics.json", "mixlora", "report.html"}
    assert json.loads((tmp_path / "demo" / "metrics.json").read_text()) == json.loads(json.dumps(report))
    routing = read_document(tmp_path / "demo" / "eval" / "mixlora")["routing"]
    assert len(routing["sites"]) == len(routing["load"]["sums"]) == 2
    assert sum(d["documents"] for d in routing["domains"].values()) == 12
    chosen = yaml.safe_load((tmp_path / "demo" / "config.yaml").read_text())
    assert chosen["lora"]["options"]["r"] == single["options"]["r"] != 2
    for text in (
        "loss counting",
        "exact match sums",
        "mixlora",
        f"{mixture['trainable_parameters']:,}",
        "same answers",
        "What the routing does",
        "experts are in effective use",
        "report.html",
    ):
        assert text in said.getvalue()


def test_an_adapter_that_answers_otherwise_after_reloading_is_an_error(
    configs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = Answers({"counting": "else", "sums": "else"}, 1.0)
    monkeypatch.setattr(demo, "fresh_answers", lambda *_: wrong)
    with pytest.raises(CheckpointError, match="reloaded, it answers"):
        demo.run_demo(configs, tmp_path, ["--max_steps", "1"], Console(file=io.StringIO()))
