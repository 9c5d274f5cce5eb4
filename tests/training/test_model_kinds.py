"""Text classifiers and vision-language models through the training job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml

import molora
from molora.data.examples import IGNORED, Collator
from molora.data.records import Record
from molora.errors import ConfigError
from molora.eval.page.terminal_tables import data_table
from molora.training import job
from molora.training.arguments import DataArguments, ModelArguments, read_arguments
from molora.training.images import encode_image
from molora.training.models import load_processor, task_of
from molora.training.rows import prepare_data
from tests.support import tiny_kinds, tiny_text

SHORT = {
    "dtype": "float32", "recipe": "mola", "options": {"num_experts": 2, "r": 4}, "per_device_train_batch_size": 8,
    "max_steps": 12, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    "use_cpu": True, "max_length": 64, "report_to": [],
}  # fmt: skip


def train(path: Path, folder: Path, domains: dict[str, Any], **more: Any) -> Any:
    """A short run; results under ``path / "out"``."""
    values = {**SHORT, "model_name_or_path": str(folder), "domains": domains, "output_dir": str(path / "out"), **more}
    (path / "run.yaml").write_text(yaml.safe_dump(values))
    return job.run(read_arguments(path / "run.yaml"))


def falls(trained: Any) -> bool:
    loss = [e["loss"] for e in trained.log if "loss" in e]
    return sum(loss[-3:]) < sum(loss[:3])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_text.model_folder(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_kinds.bert_folder(tmp_path_factory.mktemp("bert"), ("down", "flat", "up"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_kinds.llava_folder(tmp_path_factory.mktemp("llava"))


def moods(path: Path, **more: Any) -> dict[str, Any]:
    lines = [
        {"text": f"{word} {i}", "mood": mood} for i in range(15) for word, mood in (("rise", "up"), ("sink", "down"))
    ]
    value = {"path": str(tiny_text.jsonl(path / "moods.jsonl", lines)), "label_column": "mood"}
    return {"moods": value, **more}


def test_the_task_is_read_from_the_folder(llama: Path, bert: Path, llava: Path, tmp_path: Path) -> None:
    found = [task_of(ModelArguments(str(f))) for f in (llama, bert, llava)]
    assert found == ["causal-lm", "sequence-classification", "image-text-to-text"]
    assert task_of(ModelArguments(str(bert), model_task="causal-lm")) == "causal-lm"
    with pytest.raises(ConfigError, match=r"model_task: got 'causal', .* did you mean 'causal-lm'"):
        task_of(ModelArguments(str(bert), model_task="causal"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded: config.json"):
        task_of(ModelArguments(str(tmp_path)))


# --------------------------------------------------------------------------------------------------------- classifiers


@pytest.mark.parametrize("base", ["llama", "masked bert"])
def test_a_new_head_trains_is_saved_and_comes_back(base: str, llama: Path, tmp_path: Path) -> None:
    folder = llama if base == "llama" else tiny_kinds.bert_folder(tmp_path / "bert")
    numbers = tiny_text.jsonl(tmp_path / "n.jsonl", [{"text": f"stay {i}", "label": "flat"} for i in range(12)])
    domains = moods(tmp_path, more=str(numbers))
    trained = train(
        tmp_path, folder, domains, model_task="sequence-classification", eval_strategy="steps", eval_steps=12
    )
    assert falls(trained)
    assert {"eval_moods_loss", "eval_more_loss"} <= {k for entry in trained.log for k in entry}
    assert trained.data.labels == ("down", "flat", "up")
    own = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["config"]["modules_to_save"]
    assert own == (["score"] if base == "llama" else ["bert.pooler.dense", "classifier"])
    config = tf.AutoConfig.from_pretrained(tmp_path / "out")
    assert config.label2id == {"down": 0, "flat": 1, "up": 2}
    loaded = molora.load(tf.AutoModelForSequenceClassification.from_pretrained(folder, config=config), tmp_path / "out")
    data = trained.data
    table = data_table(domains, data.train_records, data.heldout_records, data.heldout)
    assert list(table.columns[1].cells) == [domains["moods"]["path"], domains["more"]]
    assert list(table.columns[4].cells) == [str(len(data.heldout[n])) for n in ("moods", "more")]
    batch = Collator(config.pad_token_id)(data.heldout["moods"])
    assert batch["labels"].shape == (len(batch["input_ids"]),)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trained.model.eval()(**batch).logits)


def test_the_seed_draws_the_new_head(llama: Path, tmp_path: Path) -> None:
    def first(seed: int) -> float:
        run = train(
            tmp_path, llama, moods(tmp_path), model_task="sequence-classification", max_steps=1, seed=seed, data_seed=0
        )
        return float(run.log[0]["loss"])

    assert first(0) == first(0) != first(1)


def test_a_head_that_is_there_keeps_its_classes_and_stays(bert: Path, tmp_path: Path) -> None:
    trained = train(tmp_path, bert, moods(tmp_path), max_steps=1)
    assert trained.data.labels == ("down", "flat", "up")
    assert {row["label"] for row in trained.data.train} == {0, 2}
    assert not [n for n, p in trained.model.named_parameters() if p.requires_grad and "classifier" in n]
    lines = [{"text": f"{i}", "label": "dwn"} for i in range(5)]
    with pytest.raises(ConfigError, match=r"x.jsonl:1: label 'dwn', expected one of .* did you mean 'down'"):
        train(tmp_path, bert, {"x": str(tiny_text.jsonl(tmp_path / "x.jsonl", lines))})


def test_numbers_are_classes_in_their_order(llama: Path, tmp_path: Path) -> None:
    lines = [{"text": f"text {i}", "label": (9, 10, 2)[i % 3]} for i in range(20)]
    arguments = DataArguments({"x": str(tiny_text.jsonl(tmp_path / "x.jsonl", lines))})
    data = prepare_data(arguments, tiny_text.tokenizer(), 0, "sequence-classification")
    assert data.labels == ("2", "9", "10")


@pytest.mark.parametrize(
    ("line", "more", "said"),
    [
        ({"text": "a {}", "label": 1}, {}, "got the labels [1], expected at least two"),
        ({"text": "a {}"}, {}, "x.jsonl:1: no 'label', which a classifier learns"),
        (
            {"messages": [{"role": "assistant", "content": "{}"}], "label": "b"},
            {},
            "x.jsonl:1: a classifier reads 'text'",
        ),
        ({"text": "a {}", "label": 1}, {"packing": True}, "packing: got model_task sequence-classification"),
    ],
)
def test_what_a_classifier_cannot_learn(
    llama: Path, tmp_path: Path, line: dict[str, Any], more: dict[str, Any], said: str
) -> None:
    lines = [json.loads(json.dumps(line).replace("{}", str(i))) for i in range(10)]
    file = str(tiny_text.jsonl(tmp_path / "x.jsonl", lines))
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, llama, {"x": file}, model_task="sequence-classification", **more)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_label_column_for_a_model_that_learns_no_labels(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"domain 'moods': label_column: this kind of model \(model_task\)"):
        train(tmp_path, llama, moods(tmp_path))


# -------------------------------------------------------------------------------------------------------------- images


def about_images(path: Path, count: int = 24) -> str:
    lines = []
    for i, name in enumerate(tiny_kinds.pictures(path, count)):
        asked = {"role": "user", "content": "which?"}
        lines.append({"image": name, "messages": [asked, {"role": "assistant", "content": f"number {i % 3}"}]})
    return str(tiny_text.jsonl(path / "images.jsonl", lines))


def test_a_vision_language_model_trains_on_images_and_comes_back(llava: Path, tmp_path: Path) -> None:
    talk = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "none"}]} for i in range(9)
    ]
    domains = {"images": about_images(tmp_path), "talk": str(tiny_text.jsonl(tmp_path / "t.jsonl", talk))}
    trained = train(
        tmp_path, llava, domains, eval_strategy="steps", eval_steps=12, train_sampling_strategy="group_by_length"
    )
    assert falls(trained)
    assert {"eval_images_loss", "eval_talk_loss"} <= {k for entry in trained.log for k in entry}
    rows = [*trained.data.heldout["images"], *trained.data.heldout["talk"]]
    batch = Collator(0)(rows)
    assert batch["pixel_values"].shape == (len(trained.data.heldout["images"]), 3, 16, 16)
    loaded = molora.load(tf.AutoModelForImageTextToText.from_pretrained(llava), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trained.model.eval()(**batch).logits)


def test_a_row_is_what_the_processor_makes_of_it_with_the_prompt_masked(llava: Path, tmp_path: Path) -> None:
    processor = load_processor(ModelArguments(str(llava)))
    (name,) = tiny_kinds.pictures(tmp_path, 1)
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    record = Record(messages=(*turns, *turns), image=str(tmp_path / name))
    (row,) = encode_image(record, processor, 100)
    said = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in record.messages]
    said[0]["content"] = [{"type": "image", "path": record.image}, *said[0]["content"]]
    whole = processor.apply_chat_template(said, tokenize=True, return_dict=True)
    assert row["input_ids"] == list(whole["input_ids"][0])
    assert processor.tokenizer.decode([x for x in row["labels"] if x != IGNORED]) == "b<|end|>b<|end|>"
    data = prepare_data(DataArguments({"x": about_images(tmp_path)}, max_length=64), processor, 0, "image-text-to-text")
    assert torch.equal(data.train[0]["pixel_values"], data.train[0:2][0]["pixel_values"])
    assert encode_image(record, processor, 8) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            {"image": "images/0.png", "text": "a"},
            "x.jsonl:1: an image needs 'messages' that ask and answer; got 'text'",
        ),
        ({"image": "broken.png", "turn": "a"}, "cannot be read as an image"),
        ({"image": "images/0.png", "turn": "a <image> b"}, "'<image>' stands in the text; leave it out"),
    ],
)
def test_a_bad_image_is_named_before_training(llava: Path, tmp_path: Path, line: dict[str, str], said: str) -> None:
    tiny_kinds.pictures(tmp_path, 1)
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    if "turn" in line:
        line["messages"] = [{"role": "user", "content": line.pop("turn")}, {"role": "assistant", "content": "c"}]  # type: ignore[assignment]
    lines = [line, {"text": "spare"}]
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, llava, {"x": str(tiny_text.jsonl(tmp_path / "x.jsonl", lines))})
    assert said in str(caught.value)
    assert str(tmp_path / "x.jsonl") in str(caught.value)


def test_a_folder_without_a_processor(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no image processor"):
        train(tmp_path, llama, {"x": about_images(tmp_path, 3)}, model_task="image-text-to-text")


def test_images_of_shapes_that_do_not_go_together() -> None:
    rows = [{"input_ids": [1], "labels": [1], "pixel_values": torch.zeros(1, n, n)} for n in (2, 3)]
    with pytest.raises(ConfigError, match="'pixel_values' of shapes .*1, 2, 2.*per_device_train_batch_size 1"):
        Collator()(rows)
