"""PEFT folders with more than LoRA matrices in them: several adapters, whole trained modules, targeted parameters."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import AdapterError, ConfigError
from molora.install import sites_of
from molora.interop.export import export_merged, mean_gates
from molora.interop.peft_lora import read_peft_lora
from tests.conftest import close
from tests.test_peft_lora import loaded_by_peft
from tests.tiny import adapters, base_model, batch, converted, output

peft = pytest.importorskip("peft", reason="the comparison is with PEFT itself, which the extra `peft` installs")


def trained(name: str, folder: Path, **options: Any) -> Any:
    """PEFT's LoRA with random A and B, and every other trained weight moved, saved into ``folder``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base_model(name), peft.LoraConfig(init_lora_weights=False, **options))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "lora_" not in n:
                p.add_(torch.randn_like(p))
    model.save_pretrained(folder)
    return model.eval()


# ---- whole trained modules ----

WHOLE: dict[str, tuple[str, dict[str, Any]]] = {
    "head_of_a_classifier": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}),
    "named": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]}),
    "norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_modules_to_save_come_with_the_lora(case: str, tmp_path: Path):
    name, options = WHOLE[case]
    theirs = trained(name, tmp_path / "peft", r=4, lora_alpha=6, **options)
    ours = molora.load(base_model(name), tmp_path / "peft").eval()
    inputs = {k: v for k, v in batch(name).items() if k != "labels"}
    with torch.no_grad():
        expected = theirs(**inputs).logits
    close(output(ours, inputs), expected, "peft_lora")
    with ours.disable_adapter():
        assert torch.equal(output(ours, inputs), output(base_model(name), inputs))
    ours.save_pretrained(tmp_path / "own")
    assert torch.equal(output(molora.load(base_model(name), tmp_path / "own").eval(), inputs), output(ours, inputs))


def test_an_expert_cannot_have_whole_trained_modules(tmp_path: Path):
    trained("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier"])
    with pytest.raises(AdapterError, match="modules_to_save.*cannot be mixed"):
        molora.convert(base_model("bert"), "meteora", adapters={"a": str(tmp_path), "b": str(tmp_path)})


def test_a_whole_module_that_is_not_there_is_refused(tmp_path: Path):
    trained("bert", tmp_path, target_modules=["query"], modules_to_save=["classifier", "pooler"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: t for k, t in tensors.items() if "pooler" not in k}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"the file has no bert\.pooler"):
        molora.load(base_model("bert"), tmp_path)


# ---- parameters instead of modules ----


def test_weights_of_linears_reached_as_parameters(tmp_path: Path):
    """Patterns are matched with the parameter's name there: "q_proj" fits none of them, "up_proj.weight" does."""
    options: dict[str, Any] = {
        "target_modules": ["v_proj"], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"],
        "alpha_pattern": {"q_proj": 32, "up_proj.weight": 1, "v_proj": 3},
    }  # fmt: skip
    theirs = trained("llama", tmp_path, r=4, lora_alpha=8, **options)
    ours = molora.load(base_model("llama"), tmp_path).eval()
    inputs = {k: v for k, v in batch("llama").items() if k != "labels"}
    with torch.no_grad():
        close(output(ours, inputs), theirs(**inputs).logits, "peft_lora")


def test_a_weight_that_is_stored_transposed_is_refused(tmp_path: Path):
    trained("gpt2", tmp_path, r=4, target_modules=[], target_parameters=["attn.c_proj.weight"])
    with pytest.raises(AdapterError, match="stores its weight transposed"):
        molora.load(base_model("gpt2"), tmp_path)


# ---- several adapters ----


def test_one_of_several_adapters_is_asked_for_by_name(tmp_path: Path):
    model = trained("llama", tmp_path / "unused", r=4, target_modules=["q_proj"])
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "both")
    model.save_pretrained(tmp_path / "named", selected_adapters=["other"])
    for folder, more in (("both", {}), ("named", {"adapters": "other"}), ("both", {"adapters": "other"})):
        ours = molora.load(base_model("llama"), tmp_path / folder, **more)
        place = tmp_path / folder / more.get("adapters", "")
        close(output(ours, batch("llama")), output(loaded_by_peft("llama", place), batch("llama")), "peft_lora")
    with pytest.raises(ConfigError, match=r"which adapter to load, of other.*adapters='other'"):
        molora.load(base_model("llama"), tmp_path / "named")
    with pytest.raises(ConfigError, match="'othr', expected one of other; did you mean 'other'"):
        molora.load(base_model("llama"), tmp_path / "named", adapters="othr")
    with pytest.raises(ConfigError, match=r"\['adapters'\], but .* needs nothing more"):
        molora.load(base_model("llama"), tmp_path / "unused", adapters="default")
    with pytest.raises(ConfigError, match=r"adapters: got \['a'\], expected str"):
        molora.load(base_model("llama"), tmp_path / "named", adapters=["a"])


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
        torch.testing.assert_close(scale * (B @ A), sum(w * s * (B @ A) for w, A, B, s in parts), rtol=1e-5, atol=1e-6)


# ---- what leaves a mixture with whole trained modules ----

OUT: dict[str, Callable[[Any, Path], Any]] = {
    "export_expert": lambda model, folder: model.export_expert(0, folder),
    "export_merged": lambda model, folder: export_merged(model, folder, [1.0]),
}


def with_trained_modules(root: Path) -> Any:
    model = converted("lora", "llama", root, modules_to_save=["lm_head", "norm"]).eval()
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
