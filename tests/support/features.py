"""Features of PyTorch and its libraries, each a function of a recipe: the rows of the README's table of features.

A row that has a test of its own is that test, on a tiny Llama.
"""

from __future__ import annotations

import copy
import functools
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import torch
import transformers
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import molora
from tests.behaviour import test_dtypes, test_generation
from tests.forward import test_checkpointing
from tests.support import behaviours, tiny
from tests.support.tolerances import close

ON_DISK = {f"model.{part}": "cpu" for part in ("embed_tokens", "layers.1", "norm", "rotary_emb")}
ON_DISK |= {"model.layers.0": "disk", "lm_head": "cpu"}


def _armed(recipe: str) -> tuple[Any, dict[str, Tensor], Tensor]:
    """A mixture of the row's own, inputs, and what it computes."""
    model, inputs = behaviours.armed(recipe, "llama"), tiny.batch("llama")
    return model, inputs, tiny.output(model, inputs)


@functools.cache
def _saved_base() -> tempfile.TemporaryDirectory[str]:
    folder = tempfile.TemporaryDirectory(prefix="molora-base-")
    tiny.base_model("llama").save_pretrained(folder.name)
    return folder


def _from_pretrained(device_map: Any) -> Any:
    folder = _saved_base().name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=folder)


def cached(recipe: str) -> None:
    for search in ("greedy", "sampling", "beams3"):
        test_generation.test_every_search_with_a_cache_is_that_without(recipe, "llama", search)
    test_generation.test_steps_after_left_padding(recipe, "llama")


def assisted(recipe: str) -> None:
    test_generation.test_assisted_decoding(recipe, "llama", "base")
    test_generation.test_prompt_lookup(recipe, "llama")


def half(recipe: str) -> None:
    for base, autocast in ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True)):
        test_dtypes.test_every_combination(recipe, "llama", base, torch.float32, autocast)


def re_entrant(recipe: str) -> None:
    model, inputs, _ = _armed(recipe)
    wanted = behaviours.train_step(model, inputs, use_cache=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    _same_step(behaviours.train_step(model, inputs, use_cache=False), wanted)


def from_outside(recipe: str) -> None:
    model, inputs, _ = _armed(recipe)
    wanted = behaviours.train_step(model, inputs, use_cache=False)
    layers = tuple(model.model.layers)
    apply_activation_checkpointing(model, check_fn=lambda m: m in layers)
    loss, grads = behaviours.train_step(model, inputs, use_cache=False)
    _same_step((loss, {n.replace("_checkpoint_wrapped_module.", ""): g for n, g in grads.items()}), wanted)


def _same_step(got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(got[0], wanted[0])
    behaviours.assert_same(got[1], wanted[1])


def compiled(recipe: str) -> None:
    model, inputs, _ = _armed(recipe)
    del model.model.layers[1]
    wanted = tiny.output(model, inputs)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    assert torch.equal(tiny.output(whole, inputs), wanted)
    torch._dynamo.reset()


def copied(recipe: str) -> None:
    model, inputs, wanted = _armed(recipe)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(tiny.output(again, inputs), wanted)


def one_device(recipe: str) -> None:
    """On a base that came by ``device_map``, and saved and loaded onto another such."""
    model = tiny.arm(molora.convert(_from_pretrained({"": "cpu"}), recipe, **behaviours.options(recipe, "llama")))
    _, inputs, wanted = _armed(recipe)
    assert torch.equal(tiny.output(model, inputs), wanted)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = molora.load(_from_pretrained({"": "cpu"}), folder)
    assert torch.equal(tiny.output(again, inputs), wanted)


def offloaded(recipe: str) -> None:
    """Layers in CPU memory and on disk that accelerate brings for each call, experts and routers among them."""
    for how in ("cpu", "disk", "both"):
        model, inputs, wanted = _armed(recipe)
        with tempfile.TemporaryDirectory() as folder:
            if how == "cpu":
                accelerate.cpu_offload(model, execution_device="cpu")
            elif how == "disk":
                accelerate.disk_offload(model, folder, execution_device="cpu")
            else:
                places = ON_DISK | {n: "cpu" for n, _ in model.named_children() if n not in ("model", "lm_head")}
                accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder)
            assert how == "both" or all(p.is_meta for p in model.parameters())
            assert torch.equal(tiny.output(model, inputs), wanted)


def dispatched(recipe: str) -> None:
    molora.convert(_from_pretrained(ON_DISK), recipe, **behaviours.options(recipe, "llama"))


def on_meta(recipe: str) -> None:
    """Sites, shapes and counts without storage: what ``molora train --dry-run`` plans with."""
    real, inputs, wanted = _armed(recipe)
    model = molora.convert(tiny.base_model("llama").to("meta"), recipe, **behaviours.options(recipe, "llama"))
    assert model._molora.sites == real._molora.sites
    assert model.get_nb_trainable_parameters() == real.get_nb_trainable_parameters()
    out = tiny.output(model, {"input_ids": inputs["input_ids"].to("meta")})
    assert out.is_meta
    assert out.shape == wanted.shape


def merged(recipe: str) -> None:
    model, inputs, wanted = _armed(recipe)
    close(tiny.output(model.merge_and_unload(), inputs), wanted, "same_math_fp32")


def exported(recipe: str) -> None:
    """Any expert as a PEFT LoRA folder, which is read again as recipe ``lora``."""
    model, inputs, _ = _armed(recipe)
    with tempfile.TemporaryDirectory() as folder:
        model.export_expert(1 if model._molora.sites[-1].num_experts > 1 else 0, Path(folder))
        loaded = molora.load(tiny.base_model("llama"), folder)
    assert not torch.equal(tiny.output(loaded, inputs), tiny.output(tiny.base_model("llama"), inputs))


def _on_llama(test: Callable[[str, str], None]) -> Callable[[str], None]:
    return lambda recipe: test(recipe, "llama")


FEATURES: dict[str, tuple[str, Callable[[str], None]]] = {
    "cached": ("generation with the KV cache: greedy, sampling, beams, left padding", cached),
    "static": ("static cache", _on_llama(test_generation.test_static_cache)),
    "assisted": ("assisted decoding, prompt lookup", assisted),
    "embeds": ("`inputs_embeds` instead of ids", _on_llama(test_generation.test_embeddings_instead_of_ids)),
    "packed": ("packed rows (`position_ids`)", _on_llama(test_generation.test_packed_sequences)),
    "half": ("bfloat16 and float16 bases, autocast", half),
    "compile": ("`torch.compile(fullgraph=True)`", compiled),
    "checkpointing": ("activation checkpointing", _on_llama(test_checkpointing.test_same_loss_and_gradients)),
    "re_entrant": ("the same with `use_reentrant=True`", re_entrant),
    "from_outside": ("the same by wrappers from outside (FSDP's, DeepSpeed's)", from_outside),
    "copied": ("deepcopy, pickle", copied),
    "one_device": ("base by `from_pretrained(device_map=...)` on one device", one_device),
    "offloaded": ("offload to CPU and disk by accelerate, after `convert` or `load`", offloaded),
    "dispatched": ("base that is spread or offloaded already", dispatched),
    "meta": ("base on the meta device (shapes alone)", on_meta),
    "exported": ("`export_expert` to a PEFT LoRA folder", exported),
    "merged": ("merging (`merge_and_unload`)", merged),
}
