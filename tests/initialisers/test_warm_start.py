"""Mixtures that start from one trained LoRA, and tapes of where tokens go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import molora
from molora.errors import AdapterError, ConfigError
from molora.surgery.install import sites_of
from tests.support.tiny import base_model, batch, converted, options, output, write_adapter
from tests.support.tolerances import close

WARM = ("mixlora", "mola", "llava_mole")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("warm") / "lora", "llama", r=4, seed=3, alpha=6)


def plain(folder: Path) -> torch.Tensor:
    return output(molora.load(base_model("llama"), folder), batch("llama"))


@pytest.mark.parametrize("recipe", ["mixlora", "mola"])
def test_without_noise_the_mixture_starts_as_the_lora(recipe: str, folder: Path, root: Path):
    own = options(recipe, "llama", root, init_from=str(folder), init_noise=0.0)
    model = molora.convert(base_model("llama"), recipe, **own)
    close(output(model, batch("llama")), plain(folder), "same_math_fp32")


@pytest.mark.parametrize("recipe", WARM)
def test_noise_makes_experts_differ_and_leaves_attention_alone(recipe: str, folder: Path, root: Path):
    own = options(recipe, "llama", root, init_from=str(folder), init_noise=0.1)
    first, again = (molora.convert(base_model("llama"), recipe, seed=4, **own) for _ in range(2))
    assert torch.equal(output(first, batch("llama")), output(again, batch("llama")))
    for _, site in sites_of(first).values():
        A0, B0, _ = site.bank.expert(0)
        for e in range(1, site.site.num_experts):
            A, B, _ = site.bank.expert(e)
            assert not torch.equal(A, A0)
            spread = (A - A0).std() / A0.std()
            assert 0.05 < spread < 0.3, "two draws of a tenth of the weights' spread"


def test_another_rank_is_refused_and_nothing_changes(folder: Path, root: Path):
    model = base_model("llama")
    with pytest.raises(AdapterError, match="rank 4.*rank 8.*r=4"):
        molora.convert(model, "mola", r=8, init_from=str(folder))
    assert type(model) is type(base_model("llama"))


@pytest.mark.parametrize("recipe", list(molora.RECIPES))
def test_a_tape_holds_every_router_once_a_forward(recipe: str, root: Path):
    model, inputs = converted(recipe, "llama", root), batch("llama")
    inputs["attention_mask"][0, :3] = 0
    before = output(model, inputs)
    with molora.record_routing(model) as tape:
        assert torch.equal(output(model, inputs), before), "recording changes nothing"
        output(model, inputs)
    expected = {m.site.path for _, m in sites_of(model).values() if m.site.lead}
    assert tape.keys() == expected
    for records in tape.values():
        assert len(records) == 2
        r = records[0]
        assert r.valid.sum() == 15
        assert r.rows == 2
        assert not r.probs.requires_grad
        assert r.weights.dtype == r.probs.dtype == torch.float32
        assert r.probs.shape == (18, r.num_experts)
        close(r.dense().sum(-1), r.weights.sum(-1), "same_math_fp32")
    output(model, inputs)
    assert all(len(records) == 2 for records in tape.values()), "the tape ends with the block"


def test_recording_while_generating_sees_each_token_once(root: Path):
    model, ids = converted("xlora", "llama", root), batch("llama")["input_ids"]
    with molora.record_routing(model) as tape:
        model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert all([r.probs.shape[0] for r in records] == [18, 2, 2, 2] for records in tape.values())


def test_a_plain_model_cannot_be_recorded():
    with pytest.raises(ConfigError, match=r"convert\(\)"), molora.record_routing(base_model("llama")):
        pass
