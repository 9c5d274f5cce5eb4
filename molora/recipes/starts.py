"""How experts start, by PEFT's names for it, and what to do instead for those of its initialisers that are no option.

Every start leaves the converted model what the base is. Bit for bit where A or B is zero; with ``"orthogonal"`` to the
rounding of ``B A = 0``; with ``"pissa"`` and ``"olora"``, where ``B0 A0`` is a part of the weight that the expert takes
back under its own gate (see ``molora/layers/banks/plain.py``), to the rounding of ``B A - B0 A0 = 0``.
"""

from __future__ import annotations

from molora.errors import ConfigError, nearest
from molora.initialisers import INITIALISERS, initialiser

__all__ = ["start"]

SHORT: dict[bool | str, str] = {True: "kaiming", False: "random"}  # what PEFT writes as a boolean


def _known() -> dict[bool | str, str]:
    """What a user may write, to the entry's name."""
    options = {name: name for name, entry in INITIALISERS.items() if not entry.instead}
    return {**SHORT, **{name: name for name in options if name not in SHORT.values()}}


def _expected() -> str:
    known = _known()
    entries = sorted(((k, INITIALISERS[name]) for k, name in known.items()), key=lambda item: item[0] is False)
    words = "; ".join(f"{entry.name or repr(k)}: {entry.about}" for k, entry in entries)
    return f"expected one of {list(known)} ({words})"


def start(init_lora_weights: bool | str) -> str:
    """The config's name of a start.

    Raises:
        ConfigError: for one that needs other base weights, or data, with what to do instead; for an unknown one.
    """
    known = _known()
    if init_lora_weights in known:
        return known[init_lora_weights]
    name = str(init_lora_weights).lower()
    found = initialiser(name)
    if found is not None and not found.instead:
        return name
    why = _expected() + nearest(name, [str(k) for k in known]) if found is None else f"but {found.instead}"
    raise ConfigError(f"init_lora_weights: got {init_lora_weights!r}, {why}")
