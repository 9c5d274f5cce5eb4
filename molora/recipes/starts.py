"""How experts start, by PEFT's names for it, and what to do instead for those of its initialisers that are no option.

Every start leaves the converted model what the base is. Bit for bit where A or B is zero; with ``"orthogonal"`` to the
rounding of ``B A = 0``; with ``"pissa"`` and ``"olora"``, where ``B0 A0`` is a part of the weight that the expert takes
back under its own gate (see ``molora/layers/banks/plain.py``), to the rounding of ``B A - B0 A0 = 0``.
"""

from __future__ import annotations

from molora.config.placements import IN_STEPS, STARTS
from molora.errors import ConfigError, nearest

__all__ = ["start"]

INITS: dict[bool | str, str] = {True: "kaiming", False: "random"}
INITS |= {name: name for name in STARTS if name not in INITS.values()}
KNOWN = (
    f"expected one of {list(INITS)} (True: kaiming A and zero B; 'gaussian': normal A of std 1/r; 'orthogonal': A and "
    "B in orthogonal halves of each expert's ranks; 'mica': B from the weight's minor singular vectors, frozen, zero "
    "A; 'pissa' or 'pissa_niter_[steps]': A and B of the weight's principal singular vectors; 'olora': of its QR "
    "decomposition; False: B random too, for tests)"
)
DATA = "it starts from data, which no option holds: convert with True, then call "
REASONS = {
    "corda": DATA + "molora.initialisers.corda.init_corda(model, dataloader)",
    "lora_ga": DATA + "molora.initialisers.lora_ga.init_lora_ga(model, dataloader)",
    "eva": DATA + "molora.initialisers.eva.init_eva(model, dataloader)",
    "loftq": "it replaces the base weight by a quantised one and starts from what that lost; load the base quantised, "
    "and convert it with True",
}


def start(init_lora_weights: bool | str) -> str:
    """The config's name of a start.

    Raises:
        ConfigError: for one that needs other base weights, or data, with what to do instead; for an unknown one.
    """
    if init_lora_weights in INITS:
        return INITS[init_lora_weights]
    name = str(init_lora_weights).lower()
    if IN_STEPS.fullmatch(name):
        return name
    reason = REASONS.get(name)
    why = KNOWN + nearest(name, [str(k) for k in INITS]) if reason is None else f"but {reason}"
    raise ConfigError(f"init_lora_weights: got {init_lora_weights!r}, {why}")
