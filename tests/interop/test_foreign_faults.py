"""Foreign folders whose parts contradict each other or mean something that is not supported: the error says which."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.errors import MoloraError
from tests.support.foreign_cases import CLASSIFIER, FORMATS, edited, refused


def rewrite(**changes: Any) -> Callable[[Path], None]:
    """Change entries of the folder's config; None takes one out."""

    def edit(folder: Path) -> None:
        path = next(p for n in ("adapter_config.json", "xlora_config.json") if (p := folder / n).exists())
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return edit


def without(form: str, *parts: str) -> Callable[[Path], object]:
    """Take out the tensors with one of these parts in their names."""
    return lambda f: edited(f / FORMATS[form][1], lambda t: [t.pop(k) for k in list(t) if any(p in k for p in parts)])


def cut(form: str, part: str, rows: int | None = None, columns: int | None = None) -> Callable[[Path], object]:
    """Keep the first rows or columns of the tensors with this part in their names."""
    return lambda f: edited(
        f / FORMATS[form][1], lambda t: t.update({k: t[k][:rows, :columns] for k in t if part in k})
    )


def renamed(form: str, old: str, new: str) -> Callable[[Path], object]:
    """Put ``new`` for ``old`` in the tensors' names."""
    return lambda f: edited(f / FORMATS[form][1], lambda t: t.update({k.replace(old, new): t.pop(k) for k in list(t)}))


def emptied(form: str, part: str) -> Callable[[Path], object]:
    """A tensor that claims a billion rows, with nothing in them."""
    return lambda f: edited(
        f / FORMATS[form][1], lambda t: t.update({k: torch.empty(10**9, 0) for k in t if part in k})
    )


def again(form: str, part: str, old: str, new: str) -> Callable[[Path], object]:
    """The tensors with ``part`` in their names a second time, other numbers, with ``new`` for ``old`` in the names."""
    return lambda f: edited(
        f / FORMATS[form][1], lambda t: t.update({k.replace(old, new): 2 * t[k] for k in list(t) if part in k})
    )


def both_shards(folder: Path) -> None:
    """Two files that are both the whole."""
    whole = folder / "model.safetensors"
    for i in (1, 2):
        shutil.copy(whole, folder / f"model-0000{i}-of-00002.safetensors")
    whole.unlink()


def numbered_wrong(folder: Path) -> None:
    both_shards(folder)
    (folder / "model-00002-of-00002.safetensors").rename(folder / "model-00007-of-00002.safetensors")


def both(*edits: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda f: [edit(f) for edit in edits]


def shard(folder: Path) -> None:
    """The first of two files, alone."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")


UP, MLP = "layers.1.mlp.up_proj", ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj", "layers.1.mlp.down_proj")
Fault = tuple[Callable[[Path], object], str]
FAULTS: dict[str, dict[str, Fault]] = {
    "mixlora": {
        "switch": (rewrite(routing_strategy="mixlora-switch"), "computes no feed-forward block"),
        "temperature": (rewrite(routing_strategy="mixlora-dynamic", temperature=0.5), "divides prob"),
        "more_experts": (rewrite(num_experts=4), "the config says num_experts=4"),
        "an_expert": (without("mixlora", f"{UP}.experts.2.lora_B"), "lora_B of expert 2 is missing"),
        "one_more": (renamed("mixlora", f"{UP}.experts.2", f"{UP}.experts.3"), "lora_A of expert 2 is missing"),
        "no_count": (rewrite(num_experts=True), "num_experts: got True"),
        "rank": (rewrite(r=3), "expected rank 3"),
        "twice": (
            lambda f: edited(
                f / FORMATS["mixlora"][1], lambda t: t.update({"mixlora.layers.0.gate.weight": torch.ones(3, 32)})
            ),
            "stand twice",
        ),
        "no_rank": (rewrite(r=None), "r: got None"),
        "expert_lora": (rewrite(expert_lora=[2]), "expert_lora: an object"),
        "top_k": (rewrite(top_k=9), "top_k: got 9"),
        "no_router": (without("mixlora", "layers.1.mlp.moe_gate"), "layer 1 has experts and no router"),
        "router": (cut("mixlora", "layers.1.mlp.moe_gate", rows=2), r"layer 1: the router has shape \(2, 32\)"),
        "no_experts": (without("mixlora", *MLP), "layer 1 has a router and no experts"),
        "widths": (cut("mixlora", f"{UP}.experts.1.lora_A", columns=31), "its experts are for linears of"),
        "empty": (emptied("mixlora", "layers.1.mlp.moe_gate"), "expected floating-point numbers"),
        "a_billion": (rewrite(num_experts=10**9), "the config says num_experts=1000000000"),
        "activation": (rewrite(act_fn="gelu"), "act_fn='gelu' for the experts, expected the base's own .*silu"),
        "no_activation": (rewrite(act_fn=["silu"]), "act_fn=.*expected the base's own"),
        "dropout": (rewrite(lora_dropout="0.05"), "lora_dropout: got '0.05'"),
        "layers": (renamed("mixlora", "layers.1", "layers.7"), "layers.7.*expected a checkpoint of this base"),
    },
    "mola": {
        "ranks": (rewrite(r=[3, 3]), "layer 1: its experts have rank 2, the config's r says 3"),
        "short": (rewrite(r=[3]), "the config's r says nothing"),
        "bias": (rewrite(bias="all"), "bias=all"),
        "no_router": (without("mola", f"{UP}.router"), "up_proj has experts and no router"),
        "experts": (cut("mola", f"{UP}.router", rows=3), "up_proj: lora_A_3 is one too many: its router has 3"),
        "shapes": (cut("mola", f"{UP}.lora_A_1", rows=1), "its experts have the shapes"),
        "empty": (emptied("mola", f"{UP}.router"), "expected floating-point numbers"),
        "alpha": (rewrite(lora_alpha="5"), "lora_alpha: got '5'"),
        "a_module": (without("mola", f"{UP}."), "up_proj is named by target_modules and has no experts"),
        "two_spellings": (again("mola", f"{UP}.lora_A_1", "A_1", "A_01"), "got .*lora_A_01"),
        "two_prefixes": (again("mola", f"{UP}.lora_A_1", "base_model.model.", ""), "stand twice"),
        "rslora": (rewrite(use_rslora=True), "use_rslora=True, expected experts and routers only"),
    },
    "meteora": {
        "two_prefixes": (again("meteora", f"{UP}.lora_A", "base_model.model.", ""), "stands twice"),
        "two_shards": (both_shards, "stands twice"),
        "shard_numbers": (numbered_wrong, "every shard of one model"),
        "base_of_no_dimension": (
            lambda f: edited(
                f / FORMATS["meteora"][1], lambda t: t.update({k: t[k].sum() for k in t if "base_layer" in k})
            ),
            r"base \(\); expected",
        ),
        "gates": (cut("meteora", f"{UP}.moe_gate", rows=2), "with one E in all"),
        "ranks": (cut("meteora", f"{UP}.lora_A", rows=5), "expected .E, in., .E r, in."),
        "base": (cut("meteora", f"{UP}.base_layer", columns=31), r"base \(48, 31\)"),
        "empty": (emptied("meteora", f"{UP}.moe_gate"), "expected floating-point numbers"),
        "shards": (shard, "every shard of one model"),
    },
    "xlora": {
        "pooled": (rewrite(use_mean_pool=False), "same for a whole sequence"),
        "depth": (rewrite(xlora_depth=3), "has 2 linears, its config says xlora_depth=3"),
        "experts": (rewrite(adapters=["math"]), "gives 28 gates, expected 14"),
        "option": (rewrite(softmax_temperature="hot"), "softmax_temperature: got 'hot'"),
        "biases": (without("xlora", "last.bias"), "some of the classifier's linears have a bias"),
        "names": (rewrite(adapters=[1, 2]), "expected names"),
        "no_config": (lambda f: (f / "xlora_config.json").write_text("{"), "no readable config"),
        "biases_of_linears_alone": (
            both(without("xlora", "last.bias"), rewrite(enable_relu_and_dropout=False)),
            "some of the classifier's linears have a bias",
        ),
        "switch": (rewrite(enable_relu_and_dropout=0), "enable_relu_and_dropout='0', expected true or false"),
        "two_spellings": (again("xlora", "inner.0", "inner.0", "inner.00"), r"got the tensor 'inner\.00"),
        "long_name": (rewrite(adapters=["a" * 300, "code"]), "does not record adapters"),
        "chain": (rewrite(enable_relu_and_dropout=False, xlora_depth=3), "has 2 linears, its config says 3"),
    },
    "peft_xlora": {
        "empty": (without("peft_xlora", "classifier"), "has 0 linears.*loses classifier tensors"),
        "no_object": (rewrite(adapters=["0"]), "expected an object of folders"),
        "long_path": (rewrite(adapters={"0": "a" * 300, "1": "1"}), "does not record adapters"),
        "no_slot": (renamed("peft_xlora", f"{CLASSIFIER}3.", ""), "got the tensor '(weight|bias)'"),
        "strange_path": (rewrite(adapters={"0": "\0", "1": "1"}), "does not record adapters"),
        "no_expert": (lambda f: (f / "1" / "adapter_model.safetensors").unlink(), "there is no adapter_model"),
    },
    "peft_lora": {
        "dora": (
            rewrite(use_dora=True),
            "use_dora=True, expected plain LoRA; turn it into .*: molora.interop.to_lora",
        ),
        "replication": (rewrite(layer_replication=[[0, 2]]), "layer_replication"),
        "fused": (rewrite(target_parameters=["mlp.experts.gate_up_proj"]), "the file has no matrices for them"),
        "names": (rewrite(modules_to_save="head"), "expected a list of names"),
    },
}


@pytest.mark.parametrize(("form", "case"), [(form, case) for form, cases in FAULTS.items() for case in cases])
def test_what_does_not_fit_together(form: str, case: str, tmp_path: Path):
    (make, _, more), (edit, words) = FORMATS[form], FAULTS[form][case]
    make(tmp_path / "x")
    edit(tmp_path / "x")
    refused(tmp_path / "x", MoloraError, words, **more)
