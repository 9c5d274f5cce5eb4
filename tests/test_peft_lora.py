"""PEFT LoRA folders: read and written without PEFT, compared with what the installed PEFT makes of them."""

from __future__ import annotations

import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import molora
from molora.errors import AdapterError, CheckpointError
from molora.interop.names import exact_pattern, first_match
from molora.interop.peft_lora import LoraAdapter, align, read_peft_lora, write_peft_lora
from tests import tiny
from tests.conftest import close

peft = pytest.importorskip("peft", reason="the comparison is with PEFT itself, which the extra `peft` installs")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 8, "lora_alpha": 3, "use_rslora": True},
    "rank_pattern": {"r": 4, "lora_alpha": 8, "rank_pattern": {"layers.0.self_attn.q_proj": 2, "mlp.down_proj": 6}},
    "alpha_pattern": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"q_proj": 32, "^model.layers.1.mlp.up_proj": 1}},
    "both_rslora": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"up_proj": 5},
    },
    "first_pattern_wins": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"a_proj": 1, "v_proj": 2, "self_attn.v_proj": 3}},
    "all_linear": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    "one_layer": {"r": 2, "lora_alpha": 2, "layers_to_transform": [1]},
    "dot_is_any_letter": {"r": 4, "lora_alpha": 8, "alpha_pattern": {"self.attn.q.proj": 32}},
}  # fmt: skip
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc", "mlp.c_proj"],
    "bert": ["query", "dense"],
}


def peft_model(name: str, **options: Any) -> Any:
    """PEFT's LoRA with random A and B on a tiny model."""
    config = {"target_modules": TARGETS[name], "init_lora_weights": False, **options}
    config["fan_in_fan_out"] = name == "gpt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT: patterns together with rsLoRA "might not be what you want"
        return peft.get_peft_model(tiny.base_model(name), peft.LoraConfig(**config)).eval()


def loaded_by_peft(name: str, folder: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as above, and for Conv1D that it switches fan_in_fan_out on
        return peft.PeftModel.from_pretrained(tiny.base_model(name), folder).eval()


def deltas(model: Any) -> dict[str, torch.Tensor]:
    """PEFT's B A scale by module path, as (out, in)."""
    out = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            delta = module.get_delta_weight("default").detach()
            out[path] = delta.t() if module.fan_in_fan_out else delta
    return out


CASES = [("llama", v) for v in VARIANTS] + [
    ("gpt2", "plain"),
    ("gpt2", "all_linear"),
    ("bert", "plain"),
    ("bert", "rslora"),
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_a_folder_of_peft_means_what_peft_computes(name: str, variant: str, tmp_path: Path):
    peft_model(name, **VARIANTS[variant]).save_pretrained(tmp_path)
    adapter = read_peft_lora(tmp_path)
    theirs = deltas(loaded_by_peft(name, tmp_path))  # saving sorts the patterns, so the saved model is no measure
    assert adapter.modules.keys() == theirs.keys()
    for path, (A, B, scale) in adapter.modules.items():
        close(scale * (B @ A), theirs[path], "peft_lora")


def write(folder: Path, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A PEFT LoRA folder by hand: one linear from 3 to 5 of rank 2, changed as told."""
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "target_modules": ["q"], "use_rslora": False}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**plain, **(config or {})}))
    save_file(tensors or matrices(), folder / "adapter_model.safetensors")
    return folder


def matrices(path: str = "base_model.model.layers.0.q", infix: str = "", r: int = 2) -> dict[str, torch.Tensor]:
    return {f"{path}.lora_A{infix}.weight": torch.ones(r, 3), f"{path}.lora_B{infix}.weight": torch.ones(5, r)}


@pytest.mark.parametrize(
    ("key", "infix", "path"),
    [
        ("base_model.model.layers.0.q", "", "layers.0.q"),
        ("base_model.model.layers.0.q", ".default", "layers.0.q"),
        ("base_model.model.default.0.q", "", "default.0.q"),
        ("base_model.model.default", ".default", "default"),
        ("base_model.model.q_default", "", "q_default"),
        ("layers.0.q", "", "layers.0.q"),
        ("base_model.model.base_model.model.q", "", "base_model.model.q"),
    ],
)
def test_names_lose_pefts_prefix_and_a_saved_adapter_name(key: str, infix: str, path: str, tmp_path: Path):
    adapter = read_peft_lora(write(tmp_path, tensors=matrices(key, infix)))
    assert list(adapter.modules) == [path]
    assert adapter.modules[path][2] == 3.0


def test_an_unknown_adapter_name_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="lora_A.other"):
        read_peft_lora(write(tmp_path, tensors=matrices(infix=".other")))


def test_the_base_name_and_missing_entries_have_pefts_defaults(tmp_path: Path):
    folder = write(tmp_path, {"base_model_name_or_path": "org/base"}, matrices(r=8))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "org/base"}')
    adapter = read_peft_lora(folder)
    assert adapter.base_model_name == "org/base"
    assert adapter.modules["layers.0.q"][2] == 1.0  # PEFT's r and lora_alpha are 8


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "all"}, "bias='all'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["head"]}, "modules_to_save"),
    "target_parameters": ({"target_parameters": ["experts.up"]}, "target_parameters"),
    "layer_replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "activated_lora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "switch_of_the_future": ({"use_quantum": True}, "use_quantum"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights"),
    "other_type": ({"peft_type": "LOHA"}, "'LOHA'"),
    "no_type": ({"peft_type": None}, "expected 'LORA'"),
    "rank_differs": ({"r": 4}, "rank 2"),
    "rank_is_bool": ({"r": True}, "r=True"),
    "alpha_is_text": ({"lora_alpha": "16"}, "lora_alpha"),
    "rslora_is_text": ({"use_rslora": "yes"}, "use_rslora"),
    "pattern_is_list": ({"alpha_pattern": ["q"]}, "alpha_pattern"),
    "regex_rank": ({"rank_pattern": {".*q": 2}}, "regular expression"),
    "regex_alpha": ({"alpha_pattern": {"layers.[0-9]+.q": 2}}, "regular expression"),
    "catastrophic": ({"alpha_pattern": {"(a+)+$" * 40: 2}}, "regular expression"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_is_not_plain_lora_is_refused(case: str, tmp_path: Path):
    config, words = BAD_CONFIGS[case]
    with pytest.raises(AdapterError, match=re.escape(words)):
        read_peft_lora(write(tmp_path, config))


ONES = torch.ones(2, 3)
KEY = "base_model.model.q"
BAD_TENSORS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "alone": ({f"{KEY}.lora_A.weight": ONES}, "lora_A alone"),
    "embedding": ({f"{KEY}.lora_embedding_A": ONES}, "embedding"),
    "convolution": ({f"{KEY}.lora_A.weight": torch.ones(2, 3, 1, 1)}, "convolution"),
    "dora": (matrices() | {f"{KEY}.lora_magnitude_vector": ONES}, "DoRA"),
    "whole_module": (matrices() | {"base_model.model.classifier.weight": ONES}, "whole trained module"),
    "bias": (matrices() | {f"{KEY}.lora_B.bias": ONES}, "not a plain LoRA matrix"),
    "integers": ({f"{KEY}.lora_A.weight": ONES.long()}, "int64"),
    "ranks_differ": (matrices() | {"base_model.model.layers.0.q.lora_B.weight": torch.ones(5, 3)}, "(r, in)"),
    "twice": (matrices() | matrices(infix=".default"), "twice"),
    "nan": (matrices() | {f"{KEY}.lora_A.weight": ONES * math.nan}, "NaN"),
    "no_path": ({"lora_A.weight": ONES}, "lora_A.weight"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_weights_that_are_not_plain_lora_are_refused(case: str, tmp_path: Path):
    tensors, words = BAD_TENSORS[case]
    with pytest.raises(AdapterError, match=re.escape(words)):
        read_peft_lora(write(tmp_path, tensors=tensors))


def test_what_is_no_folder_of_peft_is_refused(tmp_path: Path):
    with pytest.raises(AdapterError, match="adapter_config.json"):
        read_peft_lora(tmp_path / "nowhere")
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        read_peft_lora(tmp_path)


def test_a_truncated_file_is_refused(tmp_path: Path):
    write(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="bytes of data"):
        read_peft_lora(tmp_path)


def test_a_pickle_needs_permission_and_holds_tensors_only(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(matrices(), tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="allow_pickle=True"):
        read_peft_lora(tmp_path)
    assert read_peft_lora(tmp_path, allow_pickle=True).modules["layers.0.q"][2] == 3.0
    torch.save({"q": Path("x")}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="plain tensors"):
        read_peft_lora(tmp_path, allow_pickle=True)
    torch.save(matrices() | {"step": 3}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="named tensors and nothing else"):
        read_peft_lora(tmp_path, allow_pickle=True)
    torch.save({k: v * math.nan for k, v in matrices().items()}, tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="NaN"):
        read_peft_lora(tmp_path, allow_pickle=True)


def test_a_snapshot_of_the_hub_cache_is_readable_and_no_other_link(tmp_path: Path):
    snapshot, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("adapter_config.json", "adapter_model.safetensors")):
        blob = blobs / f"{i}".rjust(40, "a")
        (write(tmp_path / "plain") / name).rename(blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
    assert read_peft_lora(snapshot).modules["layers.0.q"][2] == 3.0
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to(blobs / blob.name)
    with pytest.raises(AdapterError, match="link"):
        read_peft_lora(snapshot)


PATTERNS = [
    "q", "layers.0.q", "0.q", "yers.0.q", "^layers.0.q", "^q", "layers.1.q", "layers.0.", "lay.rs.0.q", "^0.q",
    r"layers\.0\.q", r"lay\.rs.0.q",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("path", ["layers.0.q", "q", "model.layers.0.q", "x.layers.0.qq"])
def test_patterns_fit_as_in_peft(pattern: str, path: str):
    from peft.utils.other import get_pattern_key

    theirs = get_pattern_key([pattern], path)
    assert first_match([pattern], path, "here") == (pattern if re.match(rf"(.*\.)?({pattern})$", path) else None)
    assert (first_match([pattern], path, "here") or path) == theirs


def test_an_exact_pattern_fits_one_path():
    paths = ["a-b.0.q", "x.a-b.0.q", "a-bx0.q", "q"]
    assert [p for p in paths if first_match([exact_pattern("a-b.0.q")], p, "here")] == ["a-b.0.q"]


def lora(*names: str) -> LoraAdapter:
    modules = {n: (torch.ones(1, 1), torch.ones(1, 1), float(i)) for i, n in enumerate(names)}
    return LoraAdapter("here", modules, "org/base")


@pytest.mark.parametrize(
    ("names", "paths", "found"),
    [
        (["model.a.q", "model.b.q"], ["model.a.q", "model.b.q", "head"], ["model.a.q", "model.b.q"]),
        (["model.a.q", "model.b.q"], ["a.q", "b.q"], ["a.q", "b.q"]),
        (["a.q", "b.q"], ["model.a.q", "model.b.q", "model.c"], ["model.a.q", "model.b.q"]),
        (["a.q", "b.q"], ["x.y.a.q", "x.y.b.q", "z.a.q"], ["x.y.a.q", "x.y.b.q"]),
        (["q"], ["layers.q"], ["layers.q"]),
    ],
)
def test_align_adds_or_cuts_one_prefix(names: list[str], paths: list[str], found: list[str]):
    aligned = align(lora(*names), paths)
    assert list(aligned) == found
    assert [m[2] for m in aligned.values()] == list(range(len(names)))


@pytest.mark.parametrize(
    ("names", "paths", "words"),
    [
        (["model.a.q"], ["model.a.p"], "shares no module"),
        (["model.a.q"], ["model.a.p"], "model.a.p"),
        (["model.a.q"], ["a.q", "q"], "alike"),
        (["a.q"], ["x.a.q", "y.a.q"], "alike"),
        (["a.q", "b.q"], ["x.a.q", "y.b.q"], "shares no module"),
        (["a.q", "b.q"], ["a.q"], "1 modules too many: got b.q"),
        (["ba.q"], ["a.q"], "shares no module"),
    ],
)
def test_align_refuses_what_does_not_fit_as_a_whole(names: list[str], paths: list[str], words: str):
    with pytest.raises(AdapterError, match=words):
        align(lora(*names), paths)


def test_an_adapter_fits_the_bare_backbone_and_back(tmp_path: Path):
    model = peft_model("llama", r=4)
    model.save_pretrained(tmp_path)
    adapter = read_peft_lora(tmp_path)
    head = tiny.base_model("llama")
    bare = [p for p, _ in head.model.named_modules()]
    moved = align(adapter, bare)
    assert set(moved) == {p.removeprefix("model.") for p in adapter.modules}
    back = align(LoraAdapter("here", moved, None), [p for p, _ in head.named_modules()])
    assert set(back) == set(adapter.modules)


def random_modules(name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Modules of unequal rank and scale on a tiny model."""
    out = {}
    for i, (path, c) in enumerate(sorted(tiny.candidates(tiny.base_model(name)).items())):
        r = (2, 4, 4, 0)[i % 4]
        A, B = torch.randn(r, c.shape[0]), torch.randn(c.shape[1], r) * 0.2
        out[path] = (A, B, (2.0, 0.5, 16 / math.sqrt(8), 1.0)[i % 4])
    return out


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_an_export_computes_the_same_in_peft(name: str, tmp_path: Path):
    modules = random_modules(name)
    write_peft_lora(tmp_path, modules=modules, base_model_name="org/base")
    theirs = deltas(loaded_by_peft(name, tmp_path))
    assert theirs.keys() == {p for p, (A, _, _) in modules.items() if A.shape[0]}
    for path, delta in theirs.items():
        A, B, scale = modules[path]
        close(delta, scale * (B @ A), "peft_lora")
    ours = read_peft_lora(tmp_path).modules
    for path, (A, B, scale) in ours.items():
        assert torch.equal(A, modules[path][0])
        assert torch.equal(B, modules[path][1])
        assert scale == pytest.approx(modules[path][2], rel=1e-12)
    assert load_file(tmp_path / "adapter_model.safetensors").keys() == {
        f"base_model.model.{p}.lora_{x}.weight" for p in ours for x in "AB"
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_export_load_in_peft_and_import_give_the_same_outputs(name: str, tmp_path: Path):
    ours = tiny.arm(molora.convert(tiny.base_model(name), "lora", r=4)).eval()
    ours.export_expert(0, tmp_path)
    theirs = loaded_by_peft(name, tmp_path)
    inputs = tiny.batch(name)
    expected = tiny.output(ours, inputs)
    assert (expected - tiny.output(tiny.base_model(name), inputs)).abs().max() > 0.05
    close(tiny.output(theirs, inputs), expected, "peft_lora")
    again = molora.load(tiny.base_model(name), tmp_path).eval()
    assert torch.equal(tiny.output(again, inputs), expected)


def test_an_export_replaces_an_older_one_and_nothing_else(tmp_path: Path):
    modules = random_modules("llama")
    write_peft_lora(tmp_path, modules=modules, base_model_name=None)
    first = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_peft_lora(tmp_path, modules=modules, base_model_name=None)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == first
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
    with pytest.raises(CheckpointError, match="LOHA"):
        write_peft_lora(tmp_path, modules=modules, base_model_name=None)
    with pytest.raises(CheckpointError, match="rank 1"):
        write_peft_lora(
            tmp_path / "new", modules={"q": (torch.ones(0, 3), torch.ones(2, 0), 1.0)}, base_model_name=None
        )
    assert not (tmp_path / "new").exists()
