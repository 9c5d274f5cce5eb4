"""What each published method trains, written down from its own description, against the arithmetic over its config.

The matrix compares the same arithmetic with converted models, for every recipe.
"""

from __future__ import annotations

import pytest

from tests.support import sizes, tiny
from tests.support.traits import traits

RANKS = 4  # of an expert, in the small versions


def _experts(recipe: str, path: str, ffn: list[str]) -> int:
    """How many a linear has that are trained."""
    if recipe in ("mixlora", "llava_mole") and path not in ffn:
        return 1  # attention gets plain LoRA
    return {"lora": 1, "mixlora": 4, "mola": (2, 6)[sizes.layer_of(path)], "llava_mole": 3}.get(recipe, 0)


def described(recipe: str, name: str) -> dict[str, int]:
    """Trainable parameters by name and size."""
    out: dict[str, int] = {}
    linears, (ffn, lead) = sizes.linears(name), sizes.parts(name)
    if recipe == "xlora":  # 32 -> 16 -> 3 adapters at each linear
        head = {"0.weight": 32 * 16, "0.bias": 16, "1.weight": 16 * 3 * len(linears), "1.bias": 3 * len(linears)}
        return {f"molora_router.layers.{n}": size for n, size in head.items()}
    for path, (d_in, d_out) in linears.items():
        experts = _experts(recipe, path, ffn)
        ranks = 16 if recipe == "smora" else RANKS * experts
        if ranks:
            out |= {f"{path}.bank.lora_A": ranks * d_in, f"{path}.bank.lora_B": ranks * d_out}
        if path in lead if recipe in ("mixlora", "llava_mole") else recipe in ("mola", "smora", "meteora"):
            out[f"{path}.router.weight"] = {"smora": 16, "meteora": 3}.get(recipe, experts) * d_in
            if recipe == "llava_mole":
                out[f"{path}.router.bias"] = experts
    return out


@pytest.mark.parametrize("name", tiny.BUILDERS)
@pytest.mark.parametrize("recipe", ["lora", "mixlora", "mola", "smora", "llava_mole", "xlora", "meteora"])
def test_the_arithmetic_is_that_of_the_description(recipe: str, name: str) -> None:
    assert sizes.trained(traits(recipe).config, name) == described(recipe, name)
