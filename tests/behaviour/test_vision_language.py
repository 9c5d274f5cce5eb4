"""A vision-language model: experts sit on the language stack alone, and the projector trains whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import molora
from molora.errors import TargetError
from molora.surgery.install import sites_of
from tests.support import sizes
from tests.support.tiny import GQA, SMALL, VISION, arm
from tests.support.traits import having, traits

IMAGE = 60
GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [IMAGE]}
RECIPES = having(lambda t: not t.imported)


@pytest.fixture(scope="module")
def llava() -> Any:
    torch.manual_seed(0)
    vision = tf.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**GQA), image_token_id=IMAGE)
    return tf.LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE - 1, (2, 12), generator=g)
    ids[:, 2:6] = IMAGE  # four patches of a 16 x 16 image
    mask = torch.ones_like(ids)
    pixels = torch.randn(2, 3, 16, 16, generator=g)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": ids.clone()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_experts_sit_on_the_language_stack(recipe: str, llava: Any, tmp_path: Path):
    model = arm(molora.convert(copy.deepcopy(llava), recipe, **SMALL[recipe]))
    assert all("vision" not in path and "projector" not in path for path in sites_of(model))
    assert len(sites_of(model)) == len(sizes.placed(traits(recipe).config, "llama"))
    model.train()
    model(**batch()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    prompt = {k: v for k, v in batch().items() if k != "labels"}
    cached, plain = (model.generate(**prompt, **GREEDY, use_cache=c) for c in (True, False))
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path)
    loaded = molora.load(copy.deepcopy(llava), tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_the_projector_trains_whole_and_is_saved(llava: Any, tmp_path: Path):
    own = {**SMALL["llava_mole"], "modules_to_save": ["multi_modal_projector"]}
    model = arm(molora.convert(copy.deepcopy(llava), "llava_mole", **own)).train()
    trained = [n for n, p in model.named_parameters() if p.requires_grad and "projector" in n]
    assert len(trained) == 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**batch()).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        with model.disable_adapter():
            assert torch.equal(model(**batch()).logits, llava(**batch()).logits)
    model.save_pretrained(tmp_path)
    loaded = molora.load(copy.deepcopy(llava), tmp_path, trainable=True).eval()  # the flags of what was trained
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, expected)
        assert torch.equal(loaded.unload()(**batch()).logits, llava(**batch()).logits)


def test_a_module_that_is_adapted_cannot_also_train_whole(llava: Any):
    with pytest.raises(TargetError, match="modules_to_save.*also adapted"):
        molora.convert(copy.deepcopy(llava), "mola", modules_to_save=["mlp"])
