"""Feed-forward blocks are found by what a model computes: on every tiny shape, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import molora
from molora.errors import TargetError
from molora.surgery.blocks import ffn_blocks
from molora.surgery.trace import trace
from tests.support.tiny import BUILDERS, MORE, base_model

GATED = (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
BERT = (("intermediate.dense",), "output.dense")
FC = (("fc1",), "fc2")
MLP_FC = (("mlp.fc1",), "mlp.fc2")
# Model: {path of a layer: (up-side linears in the order they run, down linear)} for layers 0 and 1.
EXPECTED = {
    **{name: {"model.layers.{}": GATED} for name in ("llama", "qwen3", "mistral", "gemma3")},
    "phi3": {"model.layers.{}": (("mlp.gate_up_proj",), "mlp.down_proj")},
    "gpt2": {"transformer.h.{}": (("mlp.c_fc",), "mlp.c_proj")},
    "gpt_neox": {"gpt_neox.layers.{}": (("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h")},
    "t5": {
        "encoder.block.{}.layer.1.DenseReluDense": (("wi",), "wo"),
        "decoder.block.{}.layer.2.DenseReluDense": (("wi",), "wo"),
    },
    "t5_gated": {
        "encoder.block.{}.layer.1.DenseReluDense": (("wi_0", "wi_1"), "wo"),
        "decoder.block.{}.layer.2.DenseReluDense": (("wi_0", "wi_1"), "wo"),
    },
    "bert": {"bert.encoder.layer.{}": BERT},
    "vit": {"vit.layers.{}": MLP_FC},
    "opt": {"model.decoder.layers.{}": FC},
    "whisper": {"model.encoder.layers.{}": FC, "model.decoder.layers.{}": FC},
    "clip": {"text_model.encoder.layers.{}": MLP_FC, "vision_model.encoder.layers.{}": MLP_FC},
}


def test_every_tiny_shape_is_expected():
    assert EXPECTED.keys() == {*BUILDERS, *MORE}


@pytest.mark.parametrize("name", EXPECTED)
def test_blocks_of(name: str):
    """Each layer's block and no other, with a middle that carries a slot axis."""
    expected = {
        (tuple(f"{layer.format(i)}.{u}" for u in ups), f"{layer.format(i)}.{down}", True)
        for layer, (ups, down) in EXPECTED[name].items()
        for i in range(2)
    }
    assert {(b.ups, b.down, b.slots) for b in ffn_blocks(trace(base_model(name)))} == expected


def test_the_real_model_is_not_run_and_not_changed():
    model = base_model("llama")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    runs: list[int] = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *a: runs.append(1))
    with torch.random.fork_rng():
        state = torch.get_rng_state()
        ffn_blocks(trace(model))
        assert torch.equal(torch.get_rng_state(), state)
    handle.remove()
    assert not runs
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


class Block(nn.Module):
    """up, a middle given by name, down; also with the linears held by the layer itself."""

    def __init__(self, middle: str, width: int = 8, wide: int = 12) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, wide), nn.Linear(wide, width)
        self.norm = nn.LayerNorm(wide)
        self.middle = getattr(self, middle)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)))

    def plain(self, h: Tensor) -> Tensor:
        return torch.nn.functional.gelu(h)

    def sized(self, h: Tensor) -> Tensor:
        B, S, F = h.shape
        return torch.nn.functional.gelu(h.view(B, S, 2, F // 2)).view(B, S, F)

    def normed(self, h: Tensor) -> Tensor:
        return self.norm(h)

    def over_tokens(self, h: Tensor) -> Tensor:
        return h.cumsum(1)

    def backwards(self, h: Tensor) -> Tensor:
        return h.flip(1)


class Layer(nn.Module):
    def __init__(self, middle: str, bare: bool) -> None:
        super().__init__()
        block, self.bare = Block(middle), bare
        self.attention = nn.Linear(8, 8)
        if bare:
            self.up, self.down, self.middle = block.up, block.down, block.middle
        else:
            self.ffn = block

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x.softmax(1))
        return x + (self.down(self.middle(self.up(x))) if self.bare else self.ffn(x))


class Toy(nn.Module):
    """Two layers with a residual stream; any module with ``input_ids`` can be converted."""

    def __init__(self, middle: str, bare: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(Layer(middle, bare) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    ("middle", "found"),
    [("plain", True), ("sized", False), ("normed", None), ("over_tokens", None), ("backwards", None)],
)
def test_what_a_middle_may_do(middle: str, found: bool | None):
    """Elementwise: slots; sizes written out: a block without slots; a norm with parameters, or other tokens: none."""
    blocks = ffn_blocks(trace(Toy(middle)))
    assert [b.slots for b in blocks] == ([] if found is None else [found] * 2)


def test_a_block_that_is_no_module_and_carries_no_slots_is_refused():
    model = Toy("sized", bare=True)
    before = dict(model.named_modules())
    with pytest.raises(TargetError, match="cannot carry a slot axis.*linear by linear"):
        molora.convert(model, "mixlora", r=2, num_experts=2)
    assert dict(model.named_modules()) == before
    assert type(model) is Toy
    molora.convert(model, "llava_mole", r=2, num_experts=2)  # linear by linear


def test_without_any_block_the_recipe_is_refused():
    with pytest.raises(TargetError, match="feed-forward block"):
        molora.convert(Toy("over_tokens"), "mixlora", r=2, num_experts=2)


def test_a_model_that_cannot_be_traced_says_why():
    class Odd(Toy):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise ArithmeticError("no values here")

    with pytest.raises(TargetError, match="ArithmeticError: no values here"):
        molora.convert(Odd("plain"), "mixlora", r=2, num_experts=2)
