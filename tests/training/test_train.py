"""Arguments from YAML and flags, and the training job on a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
import yaml

import molora
from molora.data.builtin.model import cache_folder, model_folder
from molora.errors import ConfigError
from molora.training import job
from molora.training.arguments import ModelArguments, read_arguments
from molora.training.match import matched, trainable_parameters
from tests.support import tiny_text

CONFIGS = Path(molora.__file__).parent / "training" / "configs"
SMOLLM2 = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and two domain files."""
    return tiny_text.model_folder(tmp_path_factory.mktemp("tiny"))


def config(folder: Path, path: Path, **changes: Any) -> Path:
    """A YAML file for a short run on the tiny model."""
    values = {
        "model_name_or_path": str(folder),
        "dtype": "float32",
        "recipe": "mixlora",
        "options": {"num_experts": 4, "top_k": 2, "r": 4},
        "domains": tiny_text.domains(path),
        "max_length": 48,
        "output_dir": str(path / "out"),
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        **changes,
    }
    (path / "run.yaml").write_text(yaml.safe_dump(values))
    return path / "run.yaml"


# ---------------------------------------------------------------------------------------------------------- arguments


def test_flags_win_over_the_file_and_reach_into_mappings(folder: Path, tmp_path: Path) -> None:
    file = config(folder, tmp_path)
    flags = [
        "--learning-rate",
        "1e-4",
        "--options.r=2",
        "--domains.more",
        "m.jsonl",
        "--weights",
        "{sums: 2}",
        "--bf16",
    ]
    a = read_arguments(file, [*flags, "--seed", "7"])
    assert (a.training.learning_rate, a.training.bf16, a.training.seed) == (1e-4, True, 7)
    assert a.mixture.options == {"num_experts": 4, "top_k": 2, "r": 2}
    assert a.data.domains["more"] == "m.jsonl"
    assert a.data.weights == {"sums": 2}
    assert a.chosen()["learning_rate"] == 1e-4
    assert read_arguments(file).training.learning_rate == 1e-2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--learning_rat", "1"], "unknown argument 'learning_rat'; did you mean 'learning_rate'"),
        (["--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["--max_length", "2"], "max_length: got 2, expected at least 8"),
        (["--heldout", "0"], "heldout: got 0.0"),
        (["--weights.sum", "1"], "weights: 'sum' is not a domain; did you mean 'sums'"),
        (["--weights.sums", "-1"], "weights: sums: got -1, expected a number above 0"),
        (["--domains", "x.jsonl"], "domains: got 'x.jsonl', expected a mapping"),
        (["--domains", "{}"], "domains: got none"),
        (["--domains", "{a"], "--domains is not YAML"),
        (["loose"], "got 'loose', expected --argument value"),
        (["--eval_strategy", "sometimes"], "sometimes"),
    ],
)
def test_a_bad_flag_is_named(folder: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_arguments(config(folder, tmp_path), flags)
    assert said in str(caught.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    for text, said in (("- a\n", "got list"), ("a: [", "is not YAML"), ("x: 1\n", "unknown argument 'x'")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=said):
            read_arguments(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match=r"none.yaml does not exist"):
        read_arguments(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("domains: {a: b}\n")
    with pytest.raises(ConfigError, match="--recipe"):
        read_arguments(tmp_path / "bad.yaml")


def test_numbers_with_an_exponent_are_numbers(folder: Path, tmp_path: Path) -> None:
    file = config(folder, tmp_path)
    file.write_text(file.read_text() + "weight_decay: 1e-2\nweights: {sums: 2e0}\n")
    a = read_arguments(file, ["--options.router_aux_loss_coef", "1e-3"])
    assert (a.training.weight_decay, a.data.weights["sums"]) == (0.01, 2.0)
    assert a.mixture.options["router_aux_loss_coef"] == 0.001


# --------------------------------------------------------------------------------------------------------------- model


def test_models_that_are_not_there(tmp_path: Path) -> None:
    for name, said in (
        (tmp_path / "none", "does not exist"),
        (tmp_path, "has no config.json"),
        ("builtin:smol", "builtin:smollm2"),
    ):
        with pytest.raises(ConfigError, match=said):
            model_folder(str(name))


def test_a_model_that_cannot_be_loaded(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="broken cannot be loaded"):
        job.load_base(ModelArguments(str(broken), "float32"))
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="the tokenizer in .*broken cannot be loaded"):
        job.load_tokenizer(ModelArguments(str(broken)))


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("MOLORA_CACHE", raising=False)
    assert cache_folder() == tmp_path / "xdg" / "molora"
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


@pytest.fixture(scope="module")
def smollm2_shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's config, without its weights."""
    folder = tmp_path_factory.mktemp("shapes")
    tf.LlamaConfig(**SMOLLM2).save_pretrained(folder)
    return folder


def test_the_demo_compares_mixtures_of_one_size(smollm2_shapes: Path) -> None:
    files = (CONFIGS / "demo_mixlora.yaml", CONFIGS / "demo_lora.yaml")
    mixture, single = (read_arguments(f, ["--model_name_or_path", str(smollm2_shapes)]) for f in files)
    assert (mixture.data, mixture.training.learning_rate) == (single.data, single.training.learning_rate)
    assert matched(single, mixture).mixture == single.mixture  # the file already has the matching rank
    sizes = [trainable_parameters(a.model, job.recipe_config(a.mixture)) for a in (mixture, single)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.03)


def test_a_single_expert_gets_the_rank_that_matches(folder: Path, tmp_path: Path) -> None:
    reference = read_arguments(config(folder, tmp_path))
    single = read_arguments(config(folder, tmp_path), ["--recipe", "lora", "--options", "{r: 2, lora_alpha: 6}"])
    sized = matched(single, reference)
    counts = [
        trainable_parameters(ModelArguments(str(folder)), job.recipe_config(a.mixture)) for a in (reference, sized)
    ]
    per_rank = counts[1] / sized.mixture.options["r"]
    assert abs(counts[0] - counts[1]) <= per_rank / 2
    assert sized.mixture.options["lora_alpha"] == 3 * sized.mixture.options["r"]
    assert matched(reference, single) is reference


# --------------------------------------------------------------------------------------------------------------- data


def test_domains_too_long_or_held_out_in_a_file(folder: Path, tmp_path: Path) -> None:
    file = config(folder, tmp_path)
    turns = [{"role": "user", "content": "a long question"}, {"role": "assistant", "content": "x"}]
    long = tiny_text.jsonl(tmp_path / "long.jsonl", [{"messages": turns}, {"text": "spare"}])
    with pytest.raises(ConfigError, match=r"domain 'long' .*: no .* row has a token to learn within 10 tokens"):
        job.run(read_arguments(file, ["--domains", f"{{long: {long}}}", "--max_length", "10"]))
    held = tiny_text.jsonl(tmp_path / "held.jsonl", [{"text": "3 4 5 6 7 8 9 10 11 12 13 14"}, {"text": "other"}])
    a = read_arguments(file, ["--heldout_domains", f"{{counting: {held}}}"])
    data = job.prepare_data(a.data, tiny_text.tokenizer(), 0)
    assert data.train_records["counting"] == 39  # the held-out line is no longer trained on
    assert len(data.heldout_records["counting"]) == 2


# ----------------------------------------------------------------------------------------------------------------- job


def test_trains_saves_and_reloads(folder: Path, tmp_path: Path) -> None:
    trained = job.run(read_arguments(config(folder, tmp_path)))
    loss = [e["loss"] for e in trained.log if "loss" in e]
    assert sum(loss[-3:]) < sum(loss[:3])
    assert json.loads((tmp_path / "out" / "train_log.json").read_text())[0]["step"] == 1
    base = tf.AutoModelForCausalLM.from_pretrained(folder)
    loaded = molora.load(base, tmp_path / "out")
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, trained.model.eval()(ids).logits)


def test_the_same_seed_gives_the_same_run(folder: Path, tmp_path: Path) -> None:
    def losses(*flags: str) -> list[float]:
        log = job.run(read_arguments(config(folder, tmp_path, max_steps=3), flags)).log
        return [e["loss"] for e in log if "loss" in e]

    assert losses() == losses() != losses("--seed", "1")


def test_logs_the_loss_of_each_domain_when_asked(folder: Path, tmp_path: Path) -> None:
    file = config(folder, tmp_path, max_steps=2, eval_strategy="steps", eval_steps=2)
    log = job.run(read_arguments(file)).log
    assert {"eval_counting_loss", "eval_sums_loss"} <= {k for entry in log for k in entry}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recipe", "mixlor"], "expected one of lora, .*did you mean 'mixlora'"),
        (["--options.num_expert", "3"], "unknown option 'num_expert'; did you mean 'num_experts'"),
        (["--options.top_k", "9"], "top_k: got 9"),
        (["--dtype", "int8"], "dtype: got 'int8'"),
        (["--domains", "{a: nowhere.jsonl}"], "nowhere.jsonl does not exist"),
    ],
)
def test_a_bad_run_stops_before_it_trains(folder: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        job.run(read_arguments(config(folder, tmp_path), flags))
    assert not (tmp_path / "out").exists()
