"""Quantised linears as their packages make them: the base's weights stay packed while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn


class Quantisation(NamedTuple):
    """A way to pack a linear; ``package`` is what it needs."""

    title: str
    package: str
    pack: Callable[[nn.Linear], nn.Module]


def _torchao(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    from torchao.quantization import IntxWeightOnlyConfig, quantize_

    whole = nn.Sequential(linear)
    quantize_(whole, IntxWeightOnlyConfig(weight_dtype=dtype))
    return whole[0]


def _torchao_int8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    whole = nn.Sequential(linear)
    quantize_(whole, Int8WeightOnlyConfig())
    return whole[0]


def _hqq(linear: nn.Linear) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=4, group_size=32)
    return HQQLinear(linear, settings, compute_dtype=linear.weight.dtype, device="cpu")


def _gguf(linear: nn.Linear) -> nn.Module:
    import gguf
    from transformers.integrations.gguf.utils import GgufLinear

    kind = gguf.GGMLQuantizationType.Q8_0
    packed = GgufLinear(linear.in_features, linear.out_features, int(kind), linear.bias is not None)
    packed.weight.data = torch.from_numpy(gguf.quants.quantize(linear.weight.detach().numpy(), kind))
    return packed


def _bnb(linear: nn.Linear, bits: int) -> nn.Module:
    import bitsandbytes as bnb

    widths = linear.in_features, linear.out_features, linear.bias is not None
    if bits == 8:
        packed = bnb.nn.Linear8bitLt(*widths, has_fp16_weights=False)
    else:
        packed = bnb.nn.Linear4bit(*widths, quant_type="nf4", compute_dtype=linear.weight.dtype)
    packed.load_state_dict(linear.state_dict())
    return packed.to("cpu")


QUANTISED: dict[str, Quantisation] = {
    "torchao_int8": Quantisation("torchao int8", "torchao", _torchao_int8),
    "torchao_int4": Quantisation("torchao int4", "torchao", lambda m: _torchao(m, torch.int4)),
    "hqq": Quantisation("HQQ 4 bit", "hqq", _hqq),
    "gguf": Quantisation("GGUF Q8_0", "gguf", _gguf),
    "bnb8": Quantisation("bitsandbytes 8 bit", "bitsandbytes", lambda m: _bnb(m, 8)),
    "bnb4": Quantisation("bitsandbytes 4 bit", "bitsandbytes", lambda m: _bnb(m, 4)),
}


def quantise(build: Callable[[], Any], name: str) -> Any:
    """A model of ``build`` whose layers' linears are packed; the output head stays whole, as packages leave it."""
    own = QUANTISED[name]
    pytest.importorskip(own.package, reason=f"{own.package} is not installed (make setup)")
    model = build()
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in path:
            model.set_submodule(path, own.pack(module))
    return model
