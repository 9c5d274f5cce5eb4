"""What a placement and a site say of their banks: the kind of the routed one, and the ones that are always on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from molora.config.options import MOST
from molora.config.strict import Strict, at_least, shown, unwritten

__all__ = ["AlwaysOn", "SiteBank", "name_faults"]

LONGEST = 64  # characters of a name, which stands in every tensor's name
RESERVED = ("bank", "always", "router", "trained", "base_layer")  # other parts of those names, which readers look for


@dataclass(frozen=True, kw_only=True)
class AlwaysOn(Strict):
    """One more LoRA expert on each linear of a placement, of weight 1 for every token: ``y + lora_alpha / r B A x``.

    ``name``: part of its tensors' names, ``always.<name>.*``; ``bank``: its kind, a key of ``BANKS``. It is trained, it
    sees the input that the routed experts see, and it starts with A as PEFT's and B zero.
    """

    name: str
    r: int = 8
    lora_alpha: float = 16.0
    bank: str = unwritten("plain")

    def faults(self) -> list[str]:
        """A name that no module can have, and values out of range."""
        out = name_faults((self.name,)) + at_least("r", self.r, 1, MOST)
        if self.lora_alpha <= 0:
            out.append(f"lora_alpha: got {self.lora_alpha}, expected a value above 0")
        return out


@dataclass(frozen=True, kw_only=True)
class SiteBank(Strict):
    """An always-on bank of one site, resolved: one expert of rank ``r`` and factor ``scale``."""

    name: str
    r: int
    scale: float
    bank: str = unwritten("plain")

    def faults(self) -> list[str]:
        """A name that no module can have, and values out of range."""
        return name_faults((self.name,)) + at_least("r", self.r, 1, MOST)


def name_faults(names: Sequence[str]) -> list[str]:
    """What is wrong with the names of the always-on banks of one linear."""
    bad = [n for n in names if not (n.isidentifier() and n.isascii() and len(n) <= LONGEST) or n in RESERVED]
    expected = f"expected letters, digits and _, {LONGEST} at most, and none of {', '.join(RESERVED)}"
    out = [f"name: got {shown(bad[0])}, {expected}"] if bad else []
    if len(set(names)) < len(names):
        out.append(f"always: got the names {shown(tuple(names))}, expected each once")
    return out
