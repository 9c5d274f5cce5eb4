"""Out of a mixture into PEFT LoRA folders: at fixed weights, and with what is trained whole beside the experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.adapter.peft_lora import read_peft_lora
from molora.errors import ConfigError
from molora.interop.export import export_merged, mean_gates
from molora.surgery.install import sites_of
from tests.adapter.test_peft_lora import loaded_by_peft
from tests.support.tiny import adapters, arm, base_model, batch, converted, options, output
from tests.support.tolerances import close

pytest.importorskip("peft", reason="the comparison is with PEFT itself, which the extra `peft` installs")

# ---- a mixture at fixed weights as one LoRA ----


def test_merged_at_fixed_weights_is_the_sum_of_the_experts(tmp_path: Path, root: Path):
    """A router that gives the same weights to every token: the merge is then no approximation."""
    model = converted("meteora", "llama", root, top_k=3).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "router" in n:
                p.zero_()
    third = {name: 1 / 3 for name in adapters(root, "llama")}
    for i, weights in enumerate((third, [1 / 3] * 3)):
        export_merged(model, tmp_path / str(i), weights)
        close(
            output(loaded_by_peft("llama", tmp_path / str(i)), batch("llama")),
            output(model, batch("llama")),
            "peft_lora",
        )
        close(
            output(molora.load(base_model("llama"), tmp_path / str(i)), batch("llama")),
            output(model, batch("llama")),
            "peft_lora",
        )
    export_merged(model, tmp_path / "one", {"math": 1.0})
    model.export_expert("math", tmp_path / "alone")
    close(
        *(output(molora.load(base_model("llama"), tmp_path / f), batch("llama")) for f in ("one", "alone")), "peft_lora"
    )
    assert "an approximation" in (tmp_path / "one" / "README.md").read_text()


@pytest.mark.parametrize("recipe", list(molora.RECIPES))
def test_measured_mean_gates_are_the_weights_of_the_sum(recipe: str, tmp_path: Path, root: Path):
    model, inputs = converted(recipe, "llama", root).eval(), batch("llama")
    inputs["attention_mask"][0, :3] = 0
    with molora.record_routing(model) as tape:
        output(model, inputs)
    export_merged(model, tmp_path, mean_gates(tape))
    merged = read_peft_lora(tmp_path).modules
    assert output(loaded_by_peft("llama", tmp_path), inputs).isfinite().all()
    sites = {path: m for path, m in sites_of(model).values() if m.bank is not None}
    assert merged.keys() == sites.keys()
    for path, m in sites.items():
        lead = {s.site.block: p for p, s in sites.items() if s.site.block and s.site.lead}.get(m.site.block, path)
        real = torch.cat([r.dense()[r.valid] for r in tape[lead]])
        assert len(real) == 15
        A, B, scale = merged[path]
        parts = [(w, *m.bank.expert(e)) for e, w in enumerate(real.mean(0))]
        close(scale * (B @ A), sum(w * s * (B_e @ A_e) for w, A_e, B_e, s in parts).detach(), "peft_lora")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_in_half_precision_are_merged_in_float32(dtype: torch.dtype, tmp_path: Path, root: Path):
    model = converted("meteora", "llama", root).to(dtype)
    export_merged(model, tmp_path, [0.3, 0.3, 0.4])
    merged = read_peft_lora(tmp_path).modules
    for path, m in sites_of(model).values():
        A, B, scale = (torch.as_tensor(t).double() for t in merged[path])
        parts = [(w, *(torch.as_tensor(t).double() for t in m.bank.expert(e))) for e, w in enumerate([0.3, 0.3, 0.4])]
        close(scale * (B @ A), sum(w * s * (B @ A) for w, A, B, s in parts), "merged_fp32")


# ---- what leaves a mixture with whole trained modules ----

OUT: dict[str, Callable[[Any, Path], Any]] = {
    "export_expert": lambda model, folder: model.export_expert(0, folder),
    "export_merged": lambda model, folder: export_merged(model, folder, [1.0]),
}


def with_trained_modules(root: Path) -> Any:
    own = options("lora", "llama", root, modules_to_save=["lm_head", "norm"])
    model = arm(molora.convert(base_model("llama", trainable=True), "lora", **own)).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".trained." in n:
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("way", OUT)
def test_whole_trained_modules_come_along(way: str, tmp_path: Path, root: Path):
    model = with_trained_modules(root)
    OUT[way](model, tmp_path)
    expected = output(model, batch("llama"))
    close(output(loaded_by_peft("llama", tmp_path), batch("llama")), expected, "peft_lora")
    close(output(molora.load(base_model("llama"), tmp_path).eval(), batch("llama")), expected, "peft_lora")


def test_whole_trained_modules_stay_when_the_expert_is_merged(root: Path):
    model, base = with_trained_modules(root), base_model("llama")
    expected = output(model, batch("llama"))
    merged = model.merge_and_unload()
    close(output(merged, batch("llama")), expected, "same_math_fp32")
    assert [n for n, _ in merged.named_modules()] == [n for n, _ in base.named_modules()]
    assert all(p.requires_grad for p in merged.parameters())
    assert not torch.equal(merged.lm_head.weight, base.lm_head.weight)


BAD_WEIGHTS: dict[str, tuple[str, Any, str]] = {
    "too_few": ("meteora", [0.5, 0.5], "expected 3 numbers"),
    "unknown_name": ("meteora", {"maths": 1.0}, "did you mean 'math'"),
    "text": ("meteora", "even", "expected 3 numbers"),
    "not_finite": ("meteora", [float("nan"), 0.5, 0.5], "got .nan, 0.5, 0.5. for .*expected 3 numbers"),
    "switches": ("meteora", [True, False, False], "expected 3 numbers"),
    "other_numbers_by_layer": ("mola", [0.5, 0.5], "give them by site"),
    "no_names": ("mola", {"math": 1.0}, r"expected names out of model\.layers"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_refused(case: str, tmp_path: Path, root: Path):
    recipe, weights, words = BAD_WEIGHTS[case]
    with pytest.raises(ConfigError, match=words):
        export_merged(converted(recipe, "llama", root), tmp_path / "out", weights)
    assert not (tmp_path / "out").exists()


def test_a_tape_without_tokens_has_no_mean():
    with pytest.raises(ConfigError, match="no real token"):
        mean_gates({"q": []})
    assert json.dumps(mean_gates({})) == "{}"
