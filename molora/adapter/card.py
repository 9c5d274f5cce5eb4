"""The README.md of an adapter folder: what the mixture is, in the words of its config."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from molora.adapter.config import NAME
from molora.config import MoloraConfig
from molora.layers.banks import words_of
from molora.layers.mixture import Mixture

__all__ = ["model_card"]

# The Hub's name of a task: transformers' table of the classes that do it. A class in two is of the first.
PIPELINES = {
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "text-generation": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "text-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "question-answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "automatic-speech-recognition": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "fill-mask": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
}


def model_card(mixture: Mixture, fingerprint: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Markdown with the method, sizes per kind of parameter and how to load it; the same bytes for the same adapter.

    On top stand the entries that the Hugging Face Hub reads. A base that was loaded from a folder is not among them:
    the Hub knows names of its own only, and refuses others.
    """
    config, base = mixture.config, str(fingerprint.get(NAME) or "")
    experts = sorted({1 if s.role == "parameter" else s.num_experts for s in mixture.sites})
    rows = "\n".join(f"| {k} | {n:,} |" for k, n in sorted(_sizes(mixture, tensors).items()))
    names = f" Experts: {', '.join(n for n, _ in config.adapters)}." if config.adapters else ""
    return f"""---
{_metadata(config, base, str(fingerprint.get("class")))}
---

# {config.recipe} adapter for {base or "a base model"}

A mixture of LoRA experts made with molora (`pip install molora`): recipe `{config.recipe}`,
{len(mixture.sites)} adapted modules; experts a module: {" or ".join(map(str, experts))}.{names}

| parameters | number |
|---|---|
{rows}

```python
{_example(base, str(fingerprint.get("class")))}
```
"""


def _sizes(mixture: Mixture, tensors: Mapping[str, Tensor]) -> dict[str, int]:
    kinds = {f"{s.path}.{name}": f"experts, {word}" for s in mixture.sites for name, word in words_of(s).items()}
    out: dict[str, int] = {}
    for name, t in tensors.items():
        copied = "modules trained whole" if ".trained." in name else "routers"
        kind = kinds.get(name, copied)
        out[kind] = out.get(kind, 0) + t.numel()
    return out


def _metadata(config: MoloraConfig, base: str, class_name: str) -> str:
    from huggingface_hub import ModelCardData

    on_hub = _is_repo_id(base)
    data = ModelCardData(
        base_model=base if on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        library_name="molora",
        pipeline_tag=_pipeline(class_name),
        tags=["molora", config.recipe, "lora", "mixture-of-experts"],
    )
    return str(data.to_yaml())


def _is_repo_id(name: str) -> bool:
    """Whether the Hub could know a model by this name, and it is no folder here."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # not in its __all__

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return bool(name) and not os.path.exists(name)


def _pipeline(class_name: str) -> str | None:
    from transformers.models.auto import modeling_auto

    for task, table in PIPELINES.items():
        for names in getattr(modeling_auto, table).values():
            if class_name in ((names,) if isinstance(names, str) else names):
                return task
    return None


def _example(base: str, class_name: str) -> str:
    import transformers

    folder = "path/to/this/folder"
    if not isinstance(getattr(transformers, class_name, None), type):
        return f'import molora\n\nbase = ...  # the base model, a {class_name}\nmodel = molora.load(base, "{folder}")'
    both = f'  # or, both in one: molora.from_pretrained("{folder}")' if base else ""
    return f"""import molora
from transformers import {class_name}

base = {class_name}.from_pretrained({json.dumps(base or "path/to/the/base")})
model = molora.load(base, "{folder}"){both}"""
