"""How experts start, by PEFT's names for it, and why some of PEFT's initialisers have no place on a frozen base.

Every start leaves the converted model what the base is: ``B A = 0``. Bit for bit where one of the two is zero; with
``"orthogonal"`` to the rounding of ``B A``.
"""

from __future__ import annotations

from molora.config import STARTS
from molora.errors import ConfigError, nearest

__all__ = ["start"]

INITS: dict[bool | str, str] = {True: "kaiming", False: "random"}
INITS |= {name: name for name in STARTS if name not in INITS.values()}
KNOWN = (
    f"expected one of {list(INITS)} (True: kaiming A and zero B; 'gaussian': normal A of std 1/r; 'orthogonal': A and "
    "B in orthogonal halves of each expert's ranks; 'mica': B from the weight's minor singular vectors, frozen, zero "
    "A; False: B random too, for tests)"
)
SUBTRACTS = (
    "it starts from a part of the base weight and subtracts that part from the base, which is never changed here; and "
    "what a mixture adds back depends on the token. 'mica' takes singular vectors of the weight and leaves it as it is"
)
REASONS = {
    "pissa": SUBTRACTS,
    "olora": SUBTRACTS,
    "corda": SUBTRACTS + "; molora.interop.eva.init_eva(model, dataloader) starts from data",
    "lora_ga": SUBTRACTS + "; molora.interop.eva.init_eva(model, dataloader) starts from data",
    "loftq": "it replaces the base weight by a quantised one and starts from what that lost; load the base quantised, "
    "and convert it with True",
    "eva": "it starts from data, which no option holds: convert with True, then call "
    "molora.interop.eva.init_eva(model, dataloader)",
}


def start(init_lora_weights: bool | str) -> str:
    """The config's name of a start.

    Raises:
        ConfigError: for one that needs other base weights, or data, with what to do instead; for an unknown one.
    """
    if init_lora_weights in INITS:
        return INITS[init_lora_weights]
    name = str(init_lora_weights).lower()
    reason = next((REASONS[k] for k in REASONS if name == k or name.startswith(f"{k}_niter_")), None)
    why = KNOWN + nearest(name, [str(k) for k in INITS]) if reason is None else f"but {reason}"
    raise ConfigError(f"init_lora_weights: got {init_lora_weights!r}, {why}")
