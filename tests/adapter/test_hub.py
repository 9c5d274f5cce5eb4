"""To the Hugging Face Hub and back, against a hub of our own: what is uploaded, what is fetched, what is refused."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import molora
from molora.errors import AdapterError, ConfigError
from tests.support import fake_hub, tiny
from tests.support import foreign_folders as write
from tests.support.fake_hub import FakeHub
from tests.support.programs import ROOT

ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
LIMIT = 180  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a base inside."""
    place = tmp_path_factory.mktemp("hub")
    tiny.base_model("llama").save_pretrained(place / "base")
    return place


def use(hub: FakeHub, what: str, folder: Path) -> None:
    """One of :mod:`tests.support.hub_uses`, with its home in ``folder``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": "secret", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.support.hub_uses", what, str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def tensors(files: fake_hub.Files) -> set[str]:
    """Names in the header of the weights."""
    data = files["adapter_model.safetensors"]
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).keys() - {"__metadata__"}


@pytest.fixture(scope="module")
def after_uploads(folder: Path) -> Iterator[FakeHub]:
    """A hub with a README of somebody's own, after the uploads of :mod:`tests.support.hub_uses`."""
    with fake_hub.serving() as hub:
        hub.repositories["me/mine"] = {"README.md": b"---\ntags:\n- own\n---\nmy work"}
        use(hub, "push", folder)
        yield hub


@pytest.fixture
def pushed(after_uploads: FakeHub) -> Iterator[FakeHub]:
    """The same hub for each test, in any order: what a test adds goes with it."""
    repositories, tokens = copy.deepcopy(after_uploads.repositories), set(after_uploads.tokens)
    yield after_uploads
    after_uploads.repositories, after_uploads.tokens = repositories, tokens


@pytest.mark.slow
def test_a_model_uploads_its_three_files_and_nothing_of_the_base(pushed: FakeHub) -> None:
    """Converted or under PEFT's wrapper. Somebody's own README in the repository stays; PEFT's push writes its own."""
    hub = pushed
    assert hub.repositories.keys() == {"me/mine", "me/bare", "me/saved", "me/wrapped"}
    weights = {files["adapter_model.safetensors"] for files in hub.repositories.values()}
    assert len(weights) == 1
    for files in hub.repositories.values():
        assert files.keys() == ADAPTER
        assert json.loads(files["adapter_config.json"])["peft_type"] == "MOLORA"
        assert all(".bank." in n or ".router." in n for n in tensors(files))
    cards = {n: ModelCard(files["README.md"].decode()) for n, files in hub.repositories.items()}
    assert (cards["me/mine"].text.strip(), cards["me/mine"].data.tags) == ("my work", ["own", "law"])
    for name in ("me/bare", "me/saved"):
        assert "A mixture of LoRA experts" in cards[name].text
        assert "mixture-of-experts" in cards[name].data.tags
    assert "v2" in hub.revisions
    assert hub.tokens == {"Bearer secret"}


@pytest.mark.slow
def test_adapters_are_loaded_by_name_and_only_their_files_are_fetched(pushed: FakeHub, folder: Path) -> None:
    """Not a base or pickles beside them, nor what a Trainer pushed; of a foreign one, also its experts."""
    hub = pushed
    base = {"model.safetensors": b"a whole base", "training_args.bin": b"a pickle", "pytorch_model.bin": b"a pickle"}
    hub.repositories["me/mine"] |= {**base, "checkpoint-3/adapter_config.json": b"{}"}
    hub.repositories["me/empty"] = {"README.md": b"nothing", **base}
    config, head = write.xlora_config(), write.xlora_head(["inner.0", "last"], 28)
    made = write.write_xlora(folder / "x", folder / "x", config, head)
    foreign = {str(p.relative_to(made)): p.read_bytes() for p in made.rglob("*") if p.is_file()}
    assert {"math/adapter_model.safetensors", "xlora_classifier.safetensors"} <= foreign.keys()
    hub.repositories["me/foreign"] = {**foreign, **base}
    write.write(folder / "p", write.moe_peft_config("loramoe"), write.moe_peft("loramoe"), "adapter_model.bin")
    hub.repositories["me/pickled"] = {p.name: p.read_bytes() for p in (folder / "p").iterdir()}
    hub.asked.clear()
    use(hub, "load", folder)
    assert set(hub.asked) == (ADAPTER - {"README.md"}) | foreign.keys() | {"adapter_model.bin"}
    assert "Bearer other" in hub.tokens
    offline = molora.load(tiny.base_model("llama"), "me/mine", ignore_base=True, cache_dir=folder / "home" / "hub")
    assert offline._molora.config.recipe == "mola"


# ---- without a hub ----


def test_a_folder_here_always_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny.arm(molora.convert(tiny.base_model("llama"), "lora", r=2)).eval()
    model.save_pretrained("me/mine")
    loaded = molora.load(tiny.base_model("llama"), "me/mine").eval()
    inputs = tiny.batch("llama")
    assert tiny.output(loaded, inputs).equal(tiny.output(model, inputs))
    with pytest.raises(ConfigError, match="revision: got 'v2' for the folder me/mine, expected none"):
        molora.load(tiny.base_model("llama"), "me/mine", revision="v2")


@pytest.mark.parametrize("name", ["nowhere", "./me/mine", "/me/mine", "~/mine", "a/b/c"])
def test_what_cannot_be_a_repository_is_a_missing_folder(name: str) -> None:
    with pytest.raises(AdapterError, match="there is no such folder; expected an adapter folder"):
        molora.load(tiny.base_model("llama"), name)


def test_without_a_connection_a_name_is_one_clear_error() -> None:
    with pytest.raises(AdapterError, match="there is no such folder, and the Hugging Face Hub gave no repository"):
        molora.load(tiny.base_model("llama"), "me/mine")
