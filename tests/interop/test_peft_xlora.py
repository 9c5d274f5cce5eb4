"""X-LoRA between PEFT and molora, both ways: what the installed PEFT computes is what is loaded and exported."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import AdapterError, ConfigError
from molora.interop.export import export_xlora
from tests.recipes.test_parity import folders, pefts
from tests.support.tiny import arm, base_model, batch, converted, output, write_adapter
from tests.support.tolerances import close

peft = pytest.importorskip("peft", reason="the comparison is with PEFT itself, which the extra `peft` installs")

SMALL = {"xlora_depth": 2, "xlora_size": 16, "xlora_dropout_p": 0.0}
CASES: dict[str, dict[str, Any]] = {
    "depth_1": {"xlora_depth": 1},
    "depth_3_with_dropout": {"xlora_depth": 3, "xlora_dropout_p": 0.2},
    "one_gate_for_all_modules": {"layerwise_scalings": False},
    "top_k": {"top_k_lora": 2},
    "softmax_top_k": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "temperature": {"softmax_temperature": 0.5},
    "global_weight_and_pass_value": {"global_scaling_weight": 0.7, "scaling_pass_value": 0.25},
}


def saved_whole(model: Any, folder: Path) -> Path:
    """PEFT's save_pretrained, and the classifier tensors that it loses put back under the names of its state dict."""
    model.save_pretrained(folder)
    state = {k: v for k, v in model.state_dict().items() if "internal_xlora_classifier" in k}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def sharpened(model: Any) -> Any:
    """Gates far from uniform."""
    with torch.no_grad():
        for p in model.base_model.internal_xlora_classifier.parameters():
            p.mul_(6.0)
    return model.eval()


def peft_logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in batch("llama").items() if k != "labels"}).logits


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_peft_computes_what_peft_computes(case: str, tmp_path: Path, root: Path):
    own, adapters = {**SMALL, **CASES[case]}, folders(root)
    theirs = sharpened(pefts(peft, adapters, own))
    saved_whole(theirs, tmp_path)
    ours = molora.load(base_model("llama"), tmp_path, adapters=adapters).eval()
    close(output(ours, batch("llama")), peft_logits(theirs), "same_math_fp32")
    backwards = dict(reversed(adapters.items()))
    again = molora.load(base_model("llama"), tmp_path, adapters=backwards)
    assert [n for n, _ in again._molora.config.adapters] == ["0", "1", "2"], "numbers say the order"


@pytest.mark.parametrize("case", CASES)
def test_an_export_computes_the_same_in_peft_and_comes_back(case: str, tmp_path: Path, root: Path):
    ours = converted("xlora", "llama", root, **{**SMALL, **CASES[case]}).eval()
    export_xlora(ours, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = base_model("llama")
        base.config.use_cache = False
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    state = {k: v for k, v in theirs.state_dict().items() if "internal_xlora_classifier" in k}
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert state.keys() == written.keys()
    assert all(torch.equal(state[k], written[k]) for k in state)
    expected = output(ours, batch("llama"))
    close(peft_logits(theirs), expected, "same_math_fp32")
    again = molora.load(base_model("llama"), tmp_path / "out").eval()  # the experts lie in the folder
    close(output(again, batch("llama")), expected, "same_math_fp32")
    assert "- 2: math" in (tmp_path / "out" / "README.md").read_text()


def test_more_than_ten_experts_keep_their_numbers(tmp_path: Path, root: Path):
    """PEFT sorts its config by name: 0, 1, 10, 2, ...; PEFT itself would then load them in that order."""
    folder = next(iter(folders(root).values()))
    config = {"peft_type": "XLORA", "hidden_size": 32, "adapters": {n: "" for n in sorted(map(str, range(11)))}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    last = "base_model.internal_xlora_classifier.layers.0"
    save_file(
        {f"{last}.weight": torch.randn(11, 32), f"{last}.bias": torch.zeros(11)}, tmp_path / "adapter_model.safetensors"
    )
    model = molora.load(base_model("llama"), tmp_path, adapters={n: folder for n in config["adapters"]})
    assert [n for n, _ in model._molora.config.adapters] == [str(i) for i in range(11)]


def in_peft(folder: Path) -> torch.Tensor:
    """The logits of the installed PEFT with an exported X-LoRA."""
    base = base_model("llama")
    base.config.use_cache = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_logits(peft.PeftModel.from_pretrained(base, folder).eval())


def test_an_export_of_more_than_ten_experts_keeps_their_order_in_peft(tmp_path: Path):
    """PEFT numbers the experts as they come in the file, which must therefore not be sorted by name."""
    own = {f"e{i}": str(write_adapter(tmp_path / f"e{i}", "llama", r=2, seed=i, only=("q_proj",))) for i in range(12)}
    ours = arm(molora.convert(base_model("llama"), "xlora", adapters=own, **SMALL)).eval()
    with torch.no_grad():
        for p in ours.molora_router.parameters():
            p.mul_(4.0)
    export_xlora(ours, tmp_path / "out")
    close(in_peft(tmp_path / "out"), output(ours, batch("llama")), "same_math_fp32")


def test_a_module_that_pruning_left_without_experts_is_none_of_the_export(tmp_path: Path):
    """PEFT's classifier has gates for modules with LoRA only."""
    targets = {"a": ("q_proj", "v_proj"), "b": ("q_proj", "down_proj"), "c": ("q_proj",)}
    own = {n: str(write_adapter(tmp_path / n, "llama", r=2, seed=3, only=only)) for n, only in targets.items()}
    ours = arm(molora.convert(base_model("llama"), "xlora", adapters=own, **SMALL)).eval()
    ours.prune_experts([1])
    export_xlora(ours, tmp_path / "out")
    close(in_peft(tmp_path / "out"), output(ours, batch("llama")), "same_math_fp32")
    close(
        output(molora.load(base_model("llama"), tmp_path / "out"), batch("llama")),
        in_peft(tmp_path / "out"),
        "peft_lora",
    )


def test_what_peft_could_not_load_is_not_exported(tmp_path: Path, root: Path):
    with pytest.raises(ConfigError, match=r"got transformer\.h.*whose layers lie under 'model\.'"):
        export_xlora(converted("xlora", "gpt2", root), tmp_path / "out")
    with pytest.raises(ConfigError, match="global_scaling_weight other than 0"):
        export_xlora(converted("xlora", "llama", root, global_scaling_weight=0.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_peft_loses_is_told(tmp_path: Path, root: Path):
    theirs = pefts(peft, folders(root), SMALL)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"has \d linears, its config says xlora_depth=2.*loses classifier tensors"):
        molora.load(base_model("llama"), tmp_path, adapters=folders(root))


def test_paths_out_of_the_folder_are_asked_for_and_not_followed(tmp_path: Path, root: Path):
    adapters = folders(root)
    saved_whole(pefts(peft, adapters, SMALL), tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"'2': {adapters['2']!r}")):
        molora.load(base_model("llama"), tmp_path)


@pytest.mark.parametrize("recipe", ["meteora", "mola"])
def test_another_mixture_is_no_xlora(recipe: str, tmp_path: Path, root: Path):
    with pytest.raises(ConfigError, match=recipe):
        export_xlora(converted(recipe, "llama", root), tmp_path / "out")
    with pytest.raises(ConfigError, match="plain"):
        export_xlora(base_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
