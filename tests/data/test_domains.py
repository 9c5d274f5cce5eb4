"""Domains of a training job: which expert each teaches a supervised router, packed rows, all mistakes at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml
from torch.nn import functional

import molora
import molora.forward.frame
from molora.errors import ConfigError
from molora.training import job
from molora.training.arguments import DataArguments, read_arguments
from molora.training.rows import supervised_experts
from tests.support import tiny_text
from tests.support.tiny import arm, base_model

SHORT = {
    "dtype": "float32", "per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1,
    "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_length": 48, "report_to": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def adapters(folder: Path) -> dict[str, str]:
    """Two ready-made LoRAs for the model; one has a domain's name."""
    out = {}
    for seed, name in enumerate(("other", "sums")):
        model: Any = molora.convert(tf.AutoModelForCausalLM.from_pretrained(folder), "lora", r=2)
        arm(model, seed).export_expert(0, folder / name)
        out[name] = str(folder / name)
    return out


def run_file(path: Path, folder: Path, **more: Any) -> Path:
    domains = tiny_text.domains(path)
    values = {**SHORT, "model_name_or_path": str(folder), "domains": domains, "output_dir": str(path / "out"), **more}
    (path / "run.yaml").write_text(yaml.safe_dump(values))
    return path / "run.yaml"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], torch.Tensor | None]]:
    """Arguments and task ids of every forward of a mixture."""
    calls: list[tuple[dict[str, Any], torch.Tensor | None]] = []
    real = molora.forward.frame.open_frame

    def note(model: Any, mixture: Any, arguments: dict[str, Any], task_ids: torch.Tensor | None) -> Any:
        calls.append((arguments, task_ids))
        return real(model, mixture, arguments, task_ids)

    monkeypatch.setattr(molora.forward.frame, "open_frame", note)
    return calls


def texts(positions: list[int]) -> list[tuple[int, int]]:
    """Where the texts of a packed row begin and end."""
    starts = [i for i, p in enumerate(positions) if p == 0]
    return list(zip(starts, [*starts[1:], len(positions)], strict=True))


# -------------------------------------------------------------------------------------------------- supervised routers


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("counting", ["other", None])
def test_each_row_names_its_domains_expert(
    folder: Path, adapters: dict[str, str], tmp_path: Path, given: Any, packing: bool, counting: str | None
) -> None:
    more = {"task_of_domain": {"counting": counting}} if counting else {}
    options = {"adapters": adapters, "top_k": 1, "temperature": 2.0}
    job.run(read_arguments(run_file(tmp_path, folder, recipe="meteora", options=options, packing=packing, **more)))
    user = tiny_text.tokenizer().convert_tokens_to_ids("<|user|>")  # only sums are conversations
    experts = {False: 0 if counting else -100, True: 1}
    assert len(given) == 6
    for arguments, task_ids in given:
        rows, tasks = arguments["input_ids"].tolist(), task_ids.tolist()
        if packing:
            bounds = texts(arguments["position_ids"][0].tolist())
            assert tasks[0] == [experts[user in rows[0][a:b]] for a, b in bounds for _ in range(a, b)]
        else:
            assert tasks == [experts[user in row] for row in rows]


def test_others_get_no_task_ids(folder: Path, tmp_path: Path, given: Any) -> None:
    job.run(read_arguments(run_file(tmp_path, folder, recipe="mola", options={"r": 2}, max_steps=1)))
    assert [task for _, task in given] == [None]


def test_routers_learn_whose_rows_they_see(folder: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    own = {"options": {"adapters": adapters, "gate_loss_coef": 5.0}, "task_of_domain": {"counting": "other"}}
    file = run_file(tmp_path, folder, recipe="meteora", max_steps=25, **own)
    trained = job.run(read_arguments(file))
    batch = job.Collator(0)(trained.data.train[:32])
    with torch.no_grad():
        right = trained.model.train()(**batch).aux_loss
        wrong = trained.model(**{**batch, "task_ids": 1 - batch["task_ids"]}).aux_loss
    assert right < 0.8 * wrong


@pytest.mark.parametrize(
    ("domains", "tasks", "said"),
    [
        ({"law": "x", "math": "y"}, {}, "expected equal names: .* task_of_domain"),
        ({"sums": "x"}, {"sums": "othr"}, "task_of_domain: sums: no adapter 'othr'; did you mean 'other'"),
    ],
)
def test_domains_that_belong_to_no_adapter(domains: dict[str, str], tasks: dict[str, str], said: str) -> None:
    config = molora.recipes.meteora(adapters={"other": "a", "sums": "b"})
    with pytest.raises(ConfigError, match=said):
        supervised_experts(config, DataArguments(domains, task_of_domain=tasks))


def test_a_recipe_without_a_supervised_loss_takes_no_tasks() -> None:
    arguments = DataArguments({"sums": "x"}, task_of_domain={"sums": "b"})
    unlabelled = molora.recipes.meteora(adapters={"b": "a", "c": "a"}, gate_loss_coef=0.0)
    for config in (molora.recipes.mola(), unlabelled):
        assert supervised_experts(config, DataArguments({"sums": "x"})) is None
        with pytest.raises(ConfigError, match="has no supervised loss"):
            supervised_experts(config, arguments)


# ------------------------------------------------------------------------------------------------------------- packing


def test_a_packed_run_trains_on_the_losses_of_its_texts(folder: Path, tmp_path: Path) -> None:
    """The Trainer's first loss, before anything is learned, is the base's on every text by itself."""
    more = {"packing": True, "per_device_train_batch_size": 2, "train_sampling_strategy": "sequential"}
    trained = job.run(read_arguments(run_file(tmp_path, folder, recipe="lora", options={"r": 2}, **more)))
    assert len(trained.data.train) < 60
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    total, count = 0.0, 0
    for row in trained.data.train[:2]:
        for a, b in texts(row["position_ids"]):
            ids, labels = (torch.tensor(row[k][a:b]) for k in ("input_ids", "labels"))
            logits = base(ids.unsqueeze(0)).logits[0, :-1]
            total += float(functional.cross_entropy(logits, labels[1:], reduction="sum").detach())
            count += int((labels[1:] != -100).sum())
    assert trained.log[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_packing_is_refused_before_training(tmp_path: Path) -> None:
    model = base_model("opt")
    model.resize_token_embeddings(len(tiny_text.tokenizer()))
    model.save_pretrained(tmp_path / "opt")
    tiny_text.tokenizer().save_pretrained(tmp_path / "opt")
    with pytest.raises(ConfigError, match="packing: OPTForCausalLM does not keep"):
        job.run(read_arguments(run_file(tmp_path, tmp_path / "opt", recipe="lora", packing=True)))
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------------------------- errors


def test_bad_files_of_all_domains_are_named_at_once(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text":\n')
    domains = {n: str(tmp_path / f"{n}.jsonl") for n in ("empty", "bad", "none")}
    with pytest.raises(ConfigError) as caught:
        job.run(read_arguments(run_file(tmp_path, folder, recipe="lora", domains=domains)))
    bad, empty, none = str(caught.value).splitlines()
    assert empty.startswith("domain 'empty': ")
    assert "has no records" in empty
    assert "bad.jsonl:2: not JSON" in bad
    assert "none.jsonl does not exist" in none


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"domains": {"a": {"path": "x", "txt_column": "b"}}}, "domains: a: unknown entry 'txt_column'"),
        ({"domains": {"a": 3}}, "domains: a: got 3, expected a path"),
        ({"task_of_domain": {"sum": "x"}}, "task_of_domain: 'sum' is not a domain; did you mean 'sums'"),
        ({"task_of_domain": {"sums": 1}}, "task_of_domain: sums: got 1, expected the name of an adapter"),
        ({"packing": "perhaps"}, "packing"),
    ],
)
def test_a_bad_data_argument_is_named(folder: Path, tmp_path: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments(run_file(tmp_path, folder, recipe="lora", **more))
    assert said in str(caught.value)
