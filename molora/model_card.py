"""The README.md of an adapter folder: what the mixture is, in the words of its config."""

from __future__ import annotations

from torch import nn

from molora.install import Mixture

__all__ = ["model_card"]

BANK = {"lora_A": "experts, A", "lora_B": "experts, B"}
BANK |= {"frozen_A": "experts, frozen ranks", "frozen_B": "experts, frozen ranks"}


def model_card(model: nn.Module, mixture: Mixture) -> str:
    """Markdown with the method, sizes per kind of parameter and how to load it; the same bytes for the same model."""
    config, base = (
        mixture.config,
        getattr(getattr(model, "config", None), "_name_or_path", "") or "the base model",
    )
    kinds: dict[str, int] = {}
    for name, p in model.named_parameters():
        kind = BANK.get(name.rpartition(".")[2], "routers")
        if kind != "routers" or ".router." in name or name.startswith("molora_router."):
            kinds[kind] = kinds.get(kind, 0) + p.numel()
    experts = sorted({s.num_experts for s in mixture.sites})
    rows = "\n".join(f"| {k} | {n:,} |" for k, n in sorted(kinds.items()))
    names = f" Experts: {', '.join(n for n, _ in config.adapters)}." if config.adapters else ""
    return f"""---
library_name: molora
tags:
- molora
- {config.recipe}
- lora
- mixture-of-experts
---

# {config.recipe} adapter for {base}

A mixture of LoRA experts made with [molora](https://pypi.org/project/molora/): recipe `{config.recipe}`,
{len(mixture.sites)} adapted modules, {" / ".join(map(str, experts))} experts a module.{names}

| parameters | number |
|---|---|
{rows}

```python
import molora
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = molora.load(base, "path/to/this/folder")
```
"""
