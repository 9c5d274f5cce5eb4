"""What users do with the Hub, one use a call: ``python -m tests.support.hub_uses USE FOLDER``, with HF_ENDPOINT set.

A program of its own, because ``huggingface_hub`` reads its endpoint when it is imported.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import molora
from molora.errors import MoloraError
from tests.support import tiny


def model(folder: Path) -> Any:
    """An armed mixture on the base that lies in ``folder``."""
    base = type(tiny.base_model("llama")).from_pretrained(folder / "base")
    return tiny.arm(molora.convert(base, "mola", r=2, num_experts=2)).eval()


def same(loaded: Any, folder: Path) -> None:
    """``loaded`` computes what :func:`model` does."""
    inputs = tiny.batch("llama")
    assert torch.equal(tiny.output(loaded.eval(), inputs), tiny.output(model(folder), inputs))


def push(folder: Path) -> None:
    """By the ways there are; PEFT's wrapper uploads by code of PEFT and transformers."""
    mixture = model(folder)
    address = mixture.push_to_hub("me/mine", tags=["law"], token="secret", commit_message="first")
    assert "/me/mine/commit/" in address
    mixture.push_to_hub("bare", revision="v2", private=True)
    (folder / "saved").mkdir()
    (folder / "saved" / "notes.txt").write_text("private")
    mixture.save_pretrained(folder / "saved", push_to_hub=True, token="secret")
    wrapped = peft.get_peft_model(mixture.unload(), molora.peft_config("mola", r=2, num_experts=2))
    tiny.arm(wrapped.get_base_model())
    wrapped.push_to_hub("me/wrapped")


def load(folder: Path) -> None:
    """By name, with a revision, from a cache of one's own; a foreign one with experts in folders; and not at all."""
    base = type(tiny.base_model("llama")).from_pretrained(folder / "base")
    same(molora.load(base, "me/mine", token="other"), folder)
    same(molora.from_pretrained("me/mine", cache_dir=folder / "own"), folder)
    assert (folder / "own" / "models--me--mine").is_dir()
    same(molora.from_pretrained("me/bare", revision="v2"), folder)
    same(molora.from_pretrained("me/wrapped"), folder)
    mixed = molora.load(tiny.base_model("llama"), "me/foreign")
    assert [name for name, _ in mixed._molora.config.adapters] == ["math", "code"]
    for name, more, words in (
        ("me/none", {}, "there is no such folder, and the Hugging Face Hub gave no repository of that name: Repos"),
        ("me/mine", {"revision": "v9"}, "with the revision 'v9'"),
        ("me/empty", {}, "has no weights among adapter_config.json"),
        ("me/pickled", {}, "pickles .adapter_model.bin. are fetched with allow_pickle=True only"),
        ("me/my..name", {}, "HFValidationError"),
    ):
        with pytest.raises(MoloraError, match=words):
            molora.from_pretrained(name, **more)
    pickled = molora.load(tiny.base_model("llama"), "me/pickled", allow_pickle=True)
    assert pickled._molora.config.recipe == "loramoe"


if __name__ == "__main__":
    {"push": push, "load": load}[sys.argv[1]](Path(sys.argv[2]))
