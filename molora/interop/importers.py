"""The table of foreign formats. A new one is a file here with ``recognises`` and ``read``, and a line in the table."""

from __future__ import annotations

import os
from pathlib import Path

from molora.adapter.atomic_save import CONFIG, WEIGHTS
from molora.adapter.config import PEFT_TYPE as OURS
from molora.adapter.peft_lora_config import refuse
from molora.interop import meteora, mixlora, moe_peft, mola, plain_lora
from molora.interop import xlora_of_peft as peft_xlora
from molora.interop import xlora_package as xlora
from molora.interop.foreign import Importer, read_config

__all__ = ["IMPORTERS", "hub_files", "importer_of"]

IMPORTERS: dict[str, Importer] = {
    "PEFT LoRA": plain_lora,
    "PEFT X-LoRA": peft_xlora,
    "xlora": xlora,
    "MixLoRA and MoE-PEFT": mixlora,
    "MoE-PEFT's MoLA and LoRAMoE": moe_peft,
    "MoLA": mola,
    "MeteoRA": meteora,
}


def hub_files(allow_pickle: bool) -> tuple[str, ...]:
    """Patterns of the files that a reader may open, in a repository and in folders within it.

    Never all safetensors: a repository may hold its base model, too.
    """
    found = [(*e.FILES, *(e.PICKLES if allow_pickle else ())) for e in IMPORTERS.values()]
    names = dict.fromkeys((CONFIG, WEIGHTS, *(name for names in found for name in names)))  # the first two are ours
    return (*names, *(f"*/{name}" for name in names))


def importer_of(folder: str | os.PathLike[str]) -> Importer | None:
    """The reader of the format that ``folder`` is in; None when it is none of the table's.

    Raises:
        AdapterError: another method of PEFT's, with the way to make a LoRA of it.
    """
    path = Path(folder)
    config = read_config(path / CONFIG)
    found = next((importer for importer in IMPORTERS.values() if importer.recognises(path, config)), None)
    if found is None and config.get("peft_type") not in (None, OURS):
        refuse(path / CONFIG, config)
    return found
