"""`molora eval` and `molora report` on a tiny mixture: what they write, what they print, and how they refuse."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import molora
from molora.cli import eval as eval_command
from molora.cli import main as cli
from molora.cli.evaluate import Evaluation, EvaluationArguments
from molora.eval.document import FILE, read_document
from tests.support import tiny_text
from tests.support.tiny import arm


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an adapter on it, a plain LoRA on it, and the files of two domains and of questions."""
    folder = tmp_path_factory.mktemp("evaluate")
    base = tiny_text.model_folder(folder / "base")
    for name, recipe, options in (("mine", "mixlora", {"num_experts": 4, "top_k": 2}), ("plain", "lora", {})):
        model = molora.convert(tf.AutoModelForCausalLM.from_pretrained(base), recipe, r=2, **options)
        arm(model)
        model.save_pretrained(folder / name)
    (folder / "mine" / "train_log.json").write_text(json.dumps([{"step": 1, "loss": 5.0}]))
    tiny_text.domains(folder)
    tiny_text.jsonl(folder / "asked.jsonl", [{"question": "1+1", "choices": ["2", "3"], "answer": 0}] * 3)
    return folder


def domains(place: Path) -> list[str]:
    return [f"--domain={name}={place / name}.jsonl" for name in ("counting", "sums")]


Run = Any


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Calls the entry point in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["molora", *map(str, arguments)])
        for console in (eval_command.output, cli.errors):
            monkeypatch.setattr(console, "_width", 200)
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return call


SMALL = ("--documents=6", "--max-length=48", "--dtype=float32")


def test_all_parts_then_a_page_of_them(place: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "eval"
    code, said, _ = run(
        "eval", "all", place / "mine", *domains(place), *SMALL, "--out", out, f"--choices=asked={place / 'asked.jsonl'}"
    )
    assert code == 0
    for text in ("Load of model.layers.#", "Lift", "Loss with changed routing", "shuffled", "Scores", "counting"):
        assert text in said
    document = read_document(out)
    assert {"routing", "experts", "training", "ablation", "scores", "tokens"} < document.keys()
    assert document["provenance"]["data"]["sums"]["documents"] == 6
    assert document["scores"]["multiple_choice"]["asked"]["questions"] == 3
    first = document["routing"]["samples"][0]["tokens"]["attention_mask"]
    assert "".join(document["tokens"][str(i)] for i in first)[0].isdigit()
    assert [p.name for p in out.iterdir()] == [FILE]

    code, said, _ = run("report", out, "--figures", tmp_path / "figures", "--format", "svg")
    assert code == 0
    assert (out / "report.html").stat().st_size > 1e6
    assert "Not collapsed" in said
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {
        "ablation.svg", "balance-model-layers-n-mlp-gate_proj.svg", "load-model-layers-n-mlp-gate_proj.svg",
    }  # fmt: skip


def test_json_is_all_that_stdout_holds_and_the_same_seed_gives_the_same_bytes(
    place: Path, tmp_path: Path, run: Run
) -> None:
    files = []
    for name in ("a", "b"):
        code, said, _ = run(
            "eval", "routing", place / "mine", *domains(place), *SMALL, "--out", tmp_path / name, "--json"
        )
        assert code == 0
        assert set(json.loads(said)) == {"routing", "experts", "training"}
        files.append((tmp_path / name / FILE).read_bytes())
    assert files[0] == files[1]
    code, said, _ = run("report", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.html", "--json")
    assert code == 0
    assert [r["verdict"][0]["key"] for r in json.loads(said)["runs"]] == ["balance", "balance"]
    assert (tmp_path / "both.html").is_file()

    code, said, _ = run("report", tmp_path / "a", "--card", place / "mine", "--json")
    assert (code, json.loads(said)["card"]) == (0, str(place / "mine" / "README.md"))
    assert (place / "mine" / "README.md").read_text().count("## Routing") == 1
    said = run("report", tmp_path / "a", "--card", place / "mine")[1]
    assert said.rstrip().endswith(f"{tmp_path / 'a' / 'report.html'}\n{place / 'mine' / 'README.md'}")
    (tmp_path / "a" / "report.html").unlink()
    for runs, folder, words in (
        (["a"], "plain", "evaluate this adapter, or name the folder that was evaluated"),
        (["a", "b"], "mine", "--card: got 2 evaluations, expected the one of the adapter in"),
    ):
        code, _, err = run("report", *(tmp_path / r for r in runs), "--card", place / folder)
        assert (code, words in err) == (2, True)
    assert not (tmp_path / "a" / "report.html").exists()


def test_what_was_cut_off_goes_on_where_it_stopped(place: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def stopping(items: Any, what: str) -> Any:
        asked.append(what)
        if what == "routing of sums" and len(asked) == 2:
            raise KeyboardInterrupt
        return items

    named = {name: str(place / f"{name}.jsonl") for name in ("counting", "sums")}

    def evaluation(out: str) -> Evaluation:
        return Evaluation(
            EvaluationArguments(place / "mine", named, tmp_path / out, documents=6, max_length=48, dtype="float32"),
            stopping,
        )

    with pytest.raises(KeyboardInterrupt):
        evaluation("cut").routing()
    assert [p.name for p in (tmp_path / "cut").iterdir()] == [".routing.progress"]
    evaluation("cut").routing()
    assert asked == ["routing of counting", "routing of sums", "routing of sums"]
    evaluation("whole").routing()
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_collapsed_mixture_fails_when_asked_to(place: Path, tmp_path: Path, run: Run) -> None:
    """One expert's router row beats all others, whatever the token."""
    model = molora.load(tf.AutoModelForCausalLM.from_pretrained(place / "base"), place / "mine")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router" in name and parameter.ndim == 2:
                parameter.zero_()
    model.save_pretrained(tmp_path / "mine")
    out = tmp_path / "eval"
    assert run("eval", "routing", tmp_path / "mine", *domains(place), *SMALL, "--out", out)[0] == 0
    code, _, err = run("report", out, "--fail-if", "collapsed", "--fail-if", "unspecialised")
    assert code == 1
    assert "mine is collapsed" in err
    assert "mine is unspecialised" in err
    code, _, err = run("report", out, "--fail-if", "without-effect")
    assert code == 2
    assert "cannot be told: No ablation was run" in err


REFUSED: dict[str, tuple[list[str], str]] = {
    "no data": (["eval", "routing", "{place}/mine"], "got no data, expected --domain NAME=FILE"),
    "two kinds of data": (
        ["eval", "routing", "{place}/mine", "--domain=a=b", "--config=c.yaml"],
        "got both --domain and --config",
    ),
    "no name": (["eval", "routing", "{place}/mine", "--domain=x.jsonl"], "--domain: got 'x.jsonl', expected NAME=DATA"),
    "one name twice": (["eval", "score", "{place}/mine", "--domain=a=b", "--domain=a=c"], "--domain: got 'a' twice"),
    "no such file": (["eval", "routing", "{place}/mine", "--domain=a={place}/none.jsonl"], "none.jsonl does not exist"),
    "a broken line": (["eval", "routing", "{place}/mine", "--domain=a={place}/torn.jsonl"], "torn.jsonl:2"),
    "no adapter": (["eval", "routing", "{place}/base", "--domain=a={place}/sums.jsonl"], "adapter_config.json"),
    "no folder": (["eval", "ablate", "{place}/nothing", "--domain=a={place}/sums.jsonl"], "nothing"),
    "another base": (
        ["eval", "routing", "{place}/mine", "--domain=a={place}/sums.jsonl", "--base={place}/other"],
        "made for another base model",
    ),
    "no choice of experts": (
        ["eval", "routing", "{place}/plain", "--domain=a={place}/sums.jsonl"],
        "no router of this model has a choice",
    ),
    "a size": (["eval", "score", "{place}/mine", "--domain=a=b", "--max-length=2"], "--max-length: got 2, expected at"),
    "nothing to report": (["report", "{place}"], "evaluation.json does not exist; write one with `molora eval"),
    "an unknown condition": (["report", "{place}", "--fail-if=colapsed"], "did you mean 'collapsed'"),
    "a newer result": (["report", "{place}/newer.json"], "got schema 9, expected at most 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_clear_line(name: str, place: Path, tmp_path: Path, run: Run) -> None:
    (place / "torn.jsonl").write_text('{"text": "one two three"}\n{"text": \n')
    (place / "newer.json").write_text('{"schema": 9, "provenance": {}}')
    if not (place / "other").exists():
        config = tf.LlamaConfig.from_pretrained(place / "base", intermediate_size=56)
        tf.LlamaForCausalLM(config).save_pretrained(place / "other")
        tiny_text.tokenizer().save_pretrained(place / "other")
    arguments, message = REFUSED[name]
    out = ["--dtype=float32", f"--out={tmp_path / 'eval'}"] if arguments[0] == "eval" else []
    code, _, err = run(*(a.format(place=place) for a in arguments), *out)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()) or not (tmp_path / "eval" / FILE).exists()
