"""LoRA on the stacked experts of a base (``target_parameters``): the formula, every way a base runs them, the base."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import molora
from molora.errors import MoloraError
from molora.layers.stacked import FusedParameter
from molora.surgery.install import sites_of
from tests.support import behaviours, tiny
from tests.support.families import base, inputs
from tests.support.tolerances import close

BOTH = ["experts.gate_up_proj", "experts.down_proj"]
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def adapted(family: str, how: str = "eager", **options: Any) -> Any:
    """The base with armed LoRAs on its own experts, and on those alone unless told otherwise."""
    model = base(family)
    model.set_experts_implementation(how)
    options = {"r": 4, "target_modules": [], "target_parameters": BOTH, **options}
    return tiny.arm(molora.convert(model, "lora", **options)).eval()


def parts(model: Any) -> dict[str, FusedParameter]:
    return {path: m for path, m in sites_of(model).values() if isinstance(m, FusedParameter)}


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_each_expert_of_the_base_gets_a_product_of_its_own(family: str) -> None:
    """``W_e + s B_e A_e``, or its transpose added where the base stores weights so, expert by expert in float64."""
    model = adapted(family).double()
    for path, part in parts(model).items():
        W = base(family).get_parameter(path).double()
        A, B, r = part.bank.lora_A, part.bank.lora_B, 4
        for e in range(4):
            delta = (16 / r) * B[:, e * r : (e + 1) * r] @ A[e * r : (e + 1) * r]
            close(part(W)[e], W[e] + (delta.T if family == "gpt_oss" else delta), "formula")
    assert len(parts(model)) == 4


@pytest.mark.parametrize("how", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe", "gpt_oss"])
def test_however_the_base_runs_its_experts(family: str, how: str) -> None:
    """The same as with merged weights, bit for bit, and the base's own bits when off and when unloaded."""
    batch, plain = inputs(family), base(family)
    plain.set_experts_implementation(how)
    expected = tiny.output(plain, batch)
    model = adapted(family, how)
    ours = tiny.output(model, batch)
    assert (ours - expected).abs().max() > 0.05 * expected.abs().max()
    with model.disable_adapter():
        assert torch.equal(tiny.output(model, batch), expected)
    assert torch.equal(tiny.output(copy.deepcopy(model).merge_and_unload(), batch), ours)
    _, gradients = behaviours.train_step(model, batch)
    assert all(bool(g.any()) for g in gradients.values())
    assert len(gradients) == 8


def test_the_base_and_its_parameters_are_never_touched() -> None:
    model = base("mixtral").requires_grad_(False)
    before, names = dict(model.named_parameters()), list(model.state_dict())
    bits = behaviours.digest(model.state_dict())
    kinds = [type(m) for m in model.modules()]
    molora.convert(model, "lora", r=4, target_parameters=BOTH)
    behaviours.train_step(tiny.arm(model), inputs("mixtral"))
    assert model.model.layers[0].mlp.experts.gate_up_proj is before["model.layers.0.mlp.experts.gate_up_proj"]
    assert model.model.layers[0].mlp.experts.num_experts == 4  # what modelling code may read
    model.unload()
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(p is before[n] for n, p in model.named_parameters())
    assert behaviours.digest(model.state_dict()) == bits
    assert list(model.state_dict()) == names
    assert [type(m) for m in model.modules()] == kinds


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    model = adapted("mixtral", target_modules=["q_proj"])
    wanted = behaviours.train_step(model, inputs("mixtral"), use_cache=False)
    for more in ({}, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}):
        model.gradient_checkpointing_enable(**more)
        loss, gradients = behaviours.train_step(model, inputs("mixtral"), use_cache=False)
        assert torch.equal(loss, wanted[0])
        behaviours.assert_same(gradients, wanted[1])


@pytest.mark.parametrize("how", ["batched_mm", "grouped_mm"])  # the eager way asks for values, also on the base itself
def test_compiled_whole(how: str) -> None:
    model, batch = adapted("gpt_oss", how), inputs("gpt_oss")
    del model.model.layers[1]
    expected = tiny.output(model, batch)
    loss, gradients = behaviours.train_step(model, batch, use_cache=False)
    torch._dynamo.reset()
    whole: Any = torch.compile(model.eval(), backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(tiny.output(whole, batch), expected)
    model.train().zero_grad(set_to_none=True)
    again = whole(**batch, use_cache=False).loss
    again.backward()
    close(again.detach(), loss, "same_math_fp32")
    for name, g in behaviours.gradients(model).items():
        close(g, gradients[name], "same_math_fp32")
    torch._dynamo.reset()


def test_copies_and_pickles() -> None:
    model, batch = adapted("qwen3_moe", target_modules="all-linear"), inputs("qwen3_moe")
    plain = base("qwen3_moe")
    plain.set_experts_implementation("eager")  # as the adapted one has
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.output(again, batch), tiny.output(model, batch))
        tiny.arm(again.unload())
        assert torch.equal(tiny.output(again, batch), tiny.output(plain, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases(dtype: torch.dtype) -> None:
    """The adapters stay in float32; the base's own bits at B = 0, and merged weights when armed."""
    model, batch = base("olmoe").to(dtype), inputs("olmoe")
    expected = tiny.output(model, batch)
    molora.convert(model, "lora", r=4, target_modules=[], target_parameters=BOTH)
    assert torch.equal(tiny.output(model, batch), expected)
    ours = tiny.output(tiny.arm(model), batch)
    assert ours.dtype == dtype
    assert all(p.bank.lora_A.dtype == torch.float32 for p in parts(model).values())
    assert torch.equal(tiny.output(copy.deepcopy(model).merge_and_unload(), batch), ours)


def test_a_thread_that_is_off_sees_the_base() -> None:
    model, batch, wrong = adapted("mixtral"), inputs("mixtral"), list[str]()
    on = tiny.output(model, batch)
    with model.disable_adapter():
        off = tiny.output(model, batch)
    start = threading.Barrier(2, timeout=60)

    def work(expected: Tensor) -> None:
        torch.set_num_threads(1)
        start.wait()
        for _ in range(25):
            if not torch.equal(tiny.output(model, batch), expected):
                wrong.append("another thread's weights")

    def without() -> None:
        with model.disable_adapter():
            work(off)

    threads = [threading.Thread(target=work, args=(on,), daemon=True), threading.Thread(target=without, daemon=True)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    assert wrong == []


def test_behind_hooks_of_accelerate_and_not_where_experts_are_elsewhere() -> None:
    model, batch = adapted("mixtral"), inputs("mixtral")
    expected = tiny.output(model, batch)
    places = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    spread = accelerate.dispatch_model(model, {**places, "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    assert torch.equal(tiny.output(spread, batch), expected)
    offloaded = adapted("mixtral")
    accelerate.cpu_offload(offloaded, execution_device="cpu")
    with pytest.raises(MoloraError, match=r"gate_up_proj: the base's experts are not whole when they are called"):
        tiny.output(offloaded, batch)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, batch = adapted("gpt_oss", target_modules="all-linear", rank_pattern={"down_proj": 2}), inputs("gpt_oss")
    model.save_pretrained(tmp_path / "a")
    again = molora.load(base("gpt_oss"), tmp_path / "a", trainable=True)
    again.set_experts_implementation("eager")
    assert torch.equal(tiny.output(again, batch), tiny.output(model, batch))
    assert [p for p, q in again.named_parameters() if q.requires_grad] == [
        p for p, q in model.named_parameters() if q.requires_grad
    ]
    again.save_pretrained(tmp_path / "b")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
