"""What stands around a conversion: the program's default device and modes, the model's hooks, how its forward is
called, and modules that PyTorch reads past their forward."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import TargetError
from molora.surgery.install import sites_of
from tests.support import tiny

INPUTS = tiny.batch("llama")
AROUND = {
    "default device": lambda: torch.device("meta"),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
}


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("recipe", ["mixlora", "xlora"])
def test_a_mixture_is_made_the_same_whatever_is_set_around_it(
    recipe: str, around: str, root: Path, tmp_path: Path
) -> None:
    """Converted or loaded: the same weights where the model is, and they can be trained afterwards."""
    bases = [tiny.base_model("llama") for _ in range(2)]
    options = tiny.options(recipe, "llama", root)
    wanted = molora.convert(tiny.base_model("llama"), recipe, **options)
    wanted.save_pretrained(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.enter_context(AROUND[around]())
        made = [molora.convert(bases[0], recipe, **options), molora.load(bases[1], tmp_path, trainable=True)]
    own = wanted.state_dict()
    for model in made:
        assert all(torch.equal(t, own[n]) for n, t in model.state_dict().items())
        model.train()(**INPUTS).loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


class Log:
    """Something a hook is bound to that cannot be copied, as open files and locks cannot."""

    def __init__(self) -> None:
        self.lock, self.calls = threading.Lock(), 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1

    def seen(self, *_: Any) -> None:
        self.calls += 1


def test_hooks_of_the_caller_are_not_copied_and_stay() -> None:
    """Finding the feed-forward blocks runs a copy of the model, without its hooks."""
    model, log = tiny.base_model("llama"), Log()
    model.model.layers[0].mlp.register_forward_hook(log.seen)
    model.register_forward_pre_hook(log.seen)
    model = molora.convert(model, "mixlora", **tiny.SMALL["mixlora"])
    assert log.calls == 0
    model(**INPUTS)
    assert log.calls == 2
    model.unload()(**INPUTS)
    assert log.calls == 4


def test_weights_that_were_tied_meanwhile_do_not_stop_an_unload() -> None:
    model = molora.convert(tiny.base_model("llama", trainable=True), "mola", r=2)
    model.lm_head.weight = model.model.embed_tokens.weight
    base = model.unload()
    assert type(base) is type(tiny.base_model("llama"))
    assert not hasattr(base, "_molora")
    assert all(p.requires_grad for p in base.parameters())


class Plain(nn.Module):
    """Two blocks of linears; its classes differ in how their forward takes its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))

    def sum(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return x


class AnyArguments(Plain):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.sum(*args, **kwargs)


class WithoutNames(Plain):
    def forward(self, x: Tensor, /) -> Tensor:
        return self.sum(x)


class ItselfByAnotherName(Plain):
    def forward(this, x: Tensor, *more: float, scale: float = 1.0) -> Tensor:  # noqa: N805
        return this.sum(x) * scale + sum(more)


FORWARDS: dict[type[Plain], tuple[tuple[float, ...], dict[str, float]]] = {
    AnyArguments: ((), {}),
    WithoutNames: ((), {}),
    ItselfByAnotherName: ((1.0, 2.0), {"scale": 3.0}),
}


@pytest.mark.parametrize("cls", FORWARDS)
def test_a_forward_is_called_as_its_caller_calls_it(cls: type[Plain]) -> None:
    model, x = cls(), torch.randn(2, 3, 8)
    more, options = FORWARDS[cls]
    before = model(x, *more, **options)
    converted = molora.convert(model, "mola", r=2, num_experts=2, top_k=1).eval()
    torch.testing.assert_close(converted(x, *more, **options), before)
    tiny.arm(converted)
    assert not torch.allclose(converted(x, *more, **options), before)
    with pytest.raises(TypeError, match="argument"):
        converted(x, *more, **options, unknown=1)


class Encoder(nn.Module):
    """PyTorch's own encoder layer, whose eval mode reads the weights of its linears past their forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers[0](x)
        return out


def test_linears_that_pytorch_reads_in_eval_mode_are_refused() -> None:
    with pytest.raises(TargetError, match="set_fastpath_enabled"):
        molora.convert(Encoder(), "lora", r=2)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model, x = molora.convert(Encoder(), "lora", r=2).eval(), torch.randn(2, 3, 8)
        before = model(x)
        assert len(sites_of(model)) == 2
        tiny.arm(model)
        assert not torch.allclose(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_a_linear_without_widths_is_refused() -> None:
    model = Plain()
    model.up[0] = nn.LazyLinear(16)
    with pytest.raises(TargetError, match=r"up\.0: .*run the model once"):
        molora.convert(model, "lora", r=2)
