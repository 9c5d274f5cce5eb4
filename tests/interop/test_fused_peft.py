"""PEFT's ``target_parameters`` on a base's stacked experts: folders in, folders out, gradients, several mixtures."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import molora
from molora.adapter.names import first_match
from molora.errors import AdapterError, ConfigError, MoloraError
from tests.support import behaviours, tiny
from tests.support.families import base, inputs
from tests.support.tolerances import close

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# What users write: whole endings, bare names, one parameter of two, other ranks, and names of transformers 4, which
# PEFT itself turns into stacked parameters, with a pattern of twice the rank for the fused one.
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "both": ("mixtral", {"target_modules": ["q_proj", "v_proj"], "target_parameters": BOTH}),
    "alone": ("olmoe", {"target_modules": [], "target_parameters": BOTH, "use_rslora": True}),
    "one": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": ["down_proj"]}),
    "bare": ("olmoe", {"target_modules": ["q_proj"], "target_parameters": ["gate_up_proj", "experts.down_proj"]}),
    "transposed": ("gpt_oss", {"target_modules": ["o_proj"], "target_parameters": BOTH}),
    "patterns": (
        "gpt_oss",
        {"target_modules": ["o_proj"], "target_parameters": BOTH, "rank_pattern": {"experts.down_proj": 2}}
        | {"alpha_pattern": {"down_proj": 3}},
    ),
    "names_of_old": ("mixtral", {"target_modules": ["q_proj", "w1", "w2", "w3"]}),
    "old_names": ("qwen3_moe", {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}),
    "latent": ("deepseek", {"target_modules": ["o_proj"], "target_parameters": BOTH}),
}


def theirs(family: str, folder: Path, seed: int = 0, **options: Any) -> Any:
    """PEFT's own, with A and B that are not zero, and saved."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(family), LoraConfig(r=4, lora_alpha=8, **options))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) * 0.2)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any, family: str) -> Tensor:
    with torch.no_grad():
        return model(input_ids=inputs(family)["input_ids"]).logits


@pytest.mark.parametrize("case", WRITTEN)
def test_a_folder_of_peft_computes_what_it_did_there(case: str, tmp_path: Path) -> None:
    family, options = WRITTEN[case]
    expected = logits(theirs(family, tmp_path, **options), family)
    plain = logits(base(family), family)
    assert (expected - plain).abs().max() > 0.05 * plain.abs().max()
    ours = molora.load(base(family), tmp_path)
    close(logits(ours, family), expected, "peft_lora")
    with ours.disable_adapter():
        assert torch.equal(logits(ours, family), plain)
    ours.save_pretrained(tmp_path / "own")
    assert torch.equal(logits(molora.load(base(family), tmp_path / "own"), family), logits(ours, family))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_peft_computes_what_our_export_does(family: str, tmp_path: Path) -> None:
    more = {"rank_pattern": {"down_proj": 2, "k_proj": 3}, "alpha_pattern": {"gate_up_proj": 5}}
    ours = tiny.arm(molora.convert(base(family), "lora", r=4, target_parameters=BOTH, **more)).eval()
    ours.export_expert(0, tmp_path)
    close(logits(PeftModel.from_pretrained(base(family), tmp_path), family), logits(ours, family), "peft_lora")
    assert torch.equal(logits(molora.load(base(family), tmp_path), family), logits(ours, family))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_training_step_has_the_gradients_of_peft(family: str, tmp_path: Path) -> None:
    peft = theirs(family, tmp_path, target_modules=["q_proj"], target_parameters=BOTH).train()
    ours = molora.load(base(family), tmp_path, trainable=True)
    loss, _ = behaviours.train_step(ours, inputs(family))
    expected = peft(**inputs(family)).loss
    expected.backward()
    close(loss, expected.detach(), "peft_lora")
    gradients = {n.replace(".default", ""): p.grad for n, p in peft.named_parameters() if p.grad is not None}
    for _, part in behaviours.sites(ours):
        path, E, A, B = part.site.path, part.site.num_experts, part.bank.lora_A.grad, part.bank.lora_B.grad
        if part.site.role == "parameter":  # PEFT nests its wrappers: the first parameter is inside, B expert-fastest
            path = path.rpartition(".")[0] + (".base_layer" if path.endswith("gate_up_proj") else "")
            B = B.view(B.shape[0], E, -1).transpose(1, 2).reshape(B.shape)
        close(A, gradients[f"base_model.model.{path}.lora_A.weight"], "peft_lora")
        close(B, gradients[f"base_model.model.{path}.lora_B.weight"], "peft_lora")
    assert not [n for n, p in ours.named_parameters() if p.grad is not None and "lora_" not in n]


def test_one_that_is_to_be_mixed_is_refused(tmp_path: Path) -> None:
    theirs("mixtral", tmp_path, target_modules=["q_proj"], target_parameters=BOTH)
    for recipe in ("xlora", "meteora"):
        with pytest.raises(AdapterError, match=r"target_parameters=.*the base model's own experts.*molora\.load"):
            molora.convert(base("mixtral"), recipe, adapters={"a": str(tmp_path), "b": str(tmp_path)})
    with pytest.raises(AdapterError, match="the base model's own experts"):
        molora.convert(base("mixtral"), "mola", r=4, init_from=str(tmp_path))


def _without_inner(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(file).items() if ".base_layer." not in k}, file)


def _config(**values: Any) -> Any:
    def edit(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return edit


DAMAGED: dict[str, tuple[Any, str]] = {
    "half": (_without_inner, "got matrices of 1 parameters, the model has gate_up_proj, down_proj"),
    "unnamed": (_config(target_parameters=BOTH[:1]), "got matrices of 2 parameters, the model has gate_up_proj of"),
    "elsewhere": (_config(target_parameters=[*BOTH, "mlp.experts.bias"]), "the file has no matrices for them"),
    "rank": (_config(r=3), r"gate_up_proj: got r=3, but its weights have rank 4"),
    "no_list": (_config(target_parameters="mlp.experts.down_proj"), "expected a list of names"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_folder_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    damage, words = DAMAGED[case]
    theirs("mixtral", tmp_path, target_modules=[], target_parameters=BOTH)
    damage(tmp_path)
    model = base("mixtral")
    before = behaviours.snapshot(model)
    with pytest.raises(MoloraError, match=words):
        molora.load(model, tmp_path)
    assert behaviours.snapshot(model) == before


def test_a_folder_for_another_base_is_refused(tmp_path: Path) -> None:
    theirs("mixtral", tmp_path / "peft", target_modules=[], target_parameters=BOTH)
    with pytest.raises(AdapterError, match=r"expected \(E r, in\) and \(out, E r\): it was made for another base"):
        molora.load(base("qwen3_moe"), tmp_path / "peft")
    molora.load(base("olmoe"), tmp_path / "peft").save_pretrained(tmp_path / "own")
    with pytest.raises(AdapterError, match=r"for a parameter of shape \(4, 96, 32\), this model has \(4, 32, 96\)"):
        molora.load(base("gpt_oss"), tmp_path / "own", ignore_base=True)
    with pytest.raises(AdapterError, match="this model has no such parameter"):
        molora.load(tiny.base_model("llama"), tmp_path / "own", ignore_base=True)


def test_named_mixtures_take_turns(tmp_path: Path) -> None:
    config = molora.peft_config("lora", r=4, target_parameters=BOTH)
    model = get_peft_model(base("mixtral"), config)
    model.add_adapter("other", molora.peft_config("lora", r=2, target_modules=["q_proj"], target_parameters=BOTH[1:]))
    plain, seen = logits(base("mixtral"), "mixtral"), {}
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        for key, p in sorted(model.named_parameters()):
            if p.requires_grad and key.endswith("lora_B"):
                p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
        seen[name] = logits(model, "mixtral")
    assert not torch.equal(seen["default"], seen["other"])
    model.set_adapter("default")
    assert torch.equal(logits(model, "mixtral"), seen["default"])
    with model.disable_adapter():
        assert torch.equal(logits(model, "mixtral"), plain)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base("mixtral"), tmp_path)
    assert torch.equal(logits(again, "mixtral"), seen["default"])
    assert torch.equal(logits(molora.load(base("mixtral"), tmp_path), "mixtral"), seen["default"])


@pytest.mark.parametrize("path", ["down_proj", "experts.down_proj", "up_and_down_proj"])
def test_the_patterns_that_peft_writes_itself(path: str) -> None:
    """It doubles the rank of what was two linears once under a regular expression, which is not run here."""
    for pattern in (r".*\.down_proj", "down_proj", r".*\.experts\.down_proj"):
        wanted = re.match(rf"(.*\.)?({pattern})$", path)
        assert first_match([pattern], path, "") == (pattern if wanted else None)
    with pytest.raises(AdapterError, match="is not run"):
        first_match([r".*\.^down_proj"], path, "")


def test_starts_from_data_and_from_the_base_are_for_linears() -> None:
    from molora.initialisers.eva import init_eva

    model = molora.convert(base("mixtral"), "lora", r=4, target_parameters=BOTH)
    with pytest.raises(ConfigError, match="gate_up_proj is no linear with an input that PEFT could look at"):
        init_eva(model, [inputs("mixtral")])
    with pytest.raises(ConfigError, match="init_lora_weights='orthogonal', expected True, 'gaussian' or False"):
        molora.convert(base("mixtral"), "lora", r=4, target_parameters=BOTH, init_lora_weights="orthogonal")
