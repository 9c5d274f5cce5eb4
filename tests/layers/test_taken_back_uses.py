"""What one does with a mixture whose experts take their start back: export, merge, change, look inside, compile."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import molora
from molora.config.site import SiteConfig
from molora.errors import AdapterError, CheckpointError, ConfigError
from molora.eval.ablation.lesions import silenced
from molora.eval.counting.experts import expert_report
from molora.interop.export import export_merged
from molora.load import restore
from molora.training.plan.counts import activation_widths
from tests.initialisers.test_initialisers import banks, peft
from tests.layers.test_taken_back import moved, started
from tests.support import tiny
from tests.support.tolerances import close


def change(bank: Any, e: int) -> torch.Tensor:
    """The expert's change of the weight, by hand: s (B A - B0 A0)."""
    A, B, A0, minus_B0 = bank.views(e).values()
    out: torch.Tensor = bank.scales[e] * (B @ A + minus_B0 @ A0).detach()
    return out


def test_one_expert_leaves_as_a_lora_of_twice_the_rank(tmp_path: Path) -> None:
    model = moved(started("mola", num_experts=3))
    model.export_expert(1, tmp_path / "one")
    theirs = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / "one")
    for path, bank in banks(model).items():
        layer = theirs.base_model.model.get_submodule(path)
        assert layer.lora_A["default"].weight.shape[0] == 2 * bank.ranks[1]
        close(layer.get_delta_weight("default"), change(bank, 1), "peft_lora")
    export_merged(model, tmp_path / "merged", [0.5, 0.25, 0.25])
    merged = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / "merged")
    for path, bank in banks(model).items():
        wanted = 0.5 * change(bank, 0) + 0.25 * change(bank, 1) + 0.25 * change(bank, 2)
        close(merged.base_model.model.get_submodule(path).get_delta_weight("default"), wanted, "peft_lora")


def test_a_single_lora_exports_merges_and_unloads(tmp_path: Path) -> None:
    model = moved(started("lora", "olora"))
    expected = tiny.output(model, tiny.batch("llama"))
    model.export_expert(0, tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path).eval()
    close(tiny.output(theirs, tiny.batch("llama")), expected, "peft_lora")
    close(tiny.output(model.merge_and_unload(), tiny.batch("llama")), expected, "same_math_fp32")


@pytest.mark.parametrize("recipe", ["mixlora", "mola", "smora"])
def test_experts_come_and_go_with_what_they_take_back(recipe: str, tmp_path: Path) -> None:
    model = moved(started(recipe))
    before = {p: [change(b, e) for e in range(len(b.ranks))] for p, b in banks(model).items()}
    output = tiny.output(model, tiny.batch("llama"))
    model.add_expert()
    close(tiny.output(model, tiny.batch("llama")), output, "same_math_fp32")
    for path, bank in banks(model).items():
        assert all(torch.equal(change(bank, e), d) for e, d in enumerate(before[path]))
        assert len(bank.ranks) == 1 or not change(bank, len(bank.ranks) - 1).any()
    model.prune_experts([0])
    for path, bank in banks(model).items():
        kept = before[path][1:] if len(before[path]) > 1 else before[path]
        assert all(torch.equal(change(bank, e), d) for e, d in enumerate(kept))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".frozen_" in n)
    model.save_pretrained(tmp_path)
    again = molora.load(tiny.base_model("llama"), tmp_path).eval()
    assert torch.equal(tiny.output(again, tiny.batch("llama")), tiny.output(model, tiny.batch("llama")))


def test_alikeness_and_lesions_see_what_an_expert_adds_in_all() -> None:
    model = moved(started("mola", num_experts=3))
    path, bank = next(iter(banks(model).items()))
    deltas = torch.stack([change(bank, e).flatten() for e in range(3)])
    found = expert_report(model, first=0)[path]
    close(torch.tensor(found["norm"]), deltas.norm(dim=1), "same_math_fp32")
    cosines = torch.nn.functional.cosine_similarity(deltas.unsqueeze(0), deltas.unsqueeze(1), dim=-1)
    torch.testing.assert_close(torch.tensor(found["cosine"]), cosines, rtol=0, atol=6e-4)  # kept to three digits
    output, fresh = tiny.output(model, tiny.batch("llama")), started("mola", num_experts=3)
    assert not expert_report(fresh, first=0)[path]["norm"][0] > 1e-5  # nothing yet, to rounding
    with silenced(model, {p: 2 for p in banks(model)}):
        assert not any(change(b, 2).any() for b in banks(model).values())
        assert not torch.equal(tiny.output(model, tiny.batch("llama")), output)
    assert torch.equal(tiny.output(model, tiny.batch("llama")), output)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same_and_casts_keep_the_map(copied: Any) -> None:
    model = moved(started("mixlora"))
    again = copied(model)
    assert torch.equal(tiny.output(again, tiny.batch("llama")), tiny.output(model, tiny.batch("llama")))
    bank = next(iter(banks(again.double()).values()))
    assert (bank.frozen_A.dtype, bank.scale_R.dtype) == (torch.float64, torch.float32)
    assert bank.packed()[2].ranks == tuple(2 * r for r in bank.ranks)
    assert bank.packed()[0].shape[0] == bank.scale_R.shape[0] == bank.start_E[-1]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["mixlora", "mola"])
def test_the_compiler_sees_one_graph(recipe: str) -> None:
    torch._dynamo.reset()
    model = moved(started(recipe))
    expected = tiny.output(model, tiny.batch("llama"))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(tiny.output(compiled, tiny.batch("llama")), expected)
    torch._dynamo.reset()


def test_named_mixtures_of_peft_train_what_the_recipe_trains(tmp_path: Path) -> None:
    """Switching freezes and thaws by name: ranks that take a start back stay frozen, and so does MiCA's B."""
    for start, never in (("pissa", (".frozen_A", ".frozen_B")), ("mica", (".lora_B",))):
        config = molora.peft_config("mola", r=2, num_experts=2, target_modules=["q_proj"], init_lora_weights=start)
        model = peft.get_peft_model(tiny.base_model("llama"), config)
        model.set_adapter("default")
        flags = {n: p.requires_grad for n, p in model.named_parameters() if ".bank." in n}
        assert {n for n, on in flags.items() if not on} == {n for n in flags if n.endswith(never)} != set()
        moved(model.base_model.model)
        expected = tiny.output(model.eval(), tiny.batch("llama"))
        model.save_pretrained(tmp_path / start)
        again = peft.PeftModel.from_pretrained(tiny.base_model("llama"), tmp_path / start).eval()
        assert torch.equal(tiny.output(again, tiny.batch("llama")), expected)


def test_a_folder_that_leaves_out_what_is_taken_back_is_refused(tmp_path: Path) -> None:
    model = moved(started("mola"))
    state = {n: t for n, t in model.state_dict().items() if ".frozen_" not in n}
    with pytest.raises(CheckpointError, match=r"missing: .*frozen_"):
        model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match="expected one rank for all experts"):
        SiteConfig(
            path="a", placement=0, in_features=4, out_features=4, num_experts=2, ranks=(1, 2), scales=(1.0,),
            takes_back=True,
        )  # fmt: skip
    plain = tiny.arm(molora.convert(tiny.base_model("llama"), "mola", r=2))
    plain.save_pretrained(tmp_path / "plain")
    assert "takes_back" not in (tmp_path / "plain" / "adapter_config.json").read_text()
    with pytest.raises(AdapterError, match="they differ in placements, sites"):
        restore(model, tmp_path / "plain")


def test_a_plan_counts_the_copies_that_a_forward_makes() -> None:
    plain = molora.convert(tiny.base_model("llama"), "mola", r=2)
    widths = [activation_widths(m) for m in (plain, started("mola"))]
    banked = sum(b.lora_A.numel() + b.lora_B.numel() for b in banks(plain).values())
    assert [w.packed for w in widths] == [0, 2 * 4 * banked]
    assert widths[1].ranks == 2 * widths[0].ranks
    tokens = 10
    more = widths[1].bytes(tokens, False) - widths[0].bytes(tokens, False)
    assert more == 8 * banked + tokens * 4 * widths[0].ranks
