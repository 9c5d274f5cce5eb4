"""Out of a mixture into folders that PEFT reads: an X-LoRA whole, or any mixture as one plain LoRA at fixed weights.

One expert alone: ``model.export_expert(name_or_index, folder)``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.adapter.atomic_save import save_folder
from molora.adapter.peft_lora import Module
from molora.adapter.peft_lora_writer import write_peft_lora
from molora.config import GateConfig, RouterConfig
from molora.config.strict import matches
from molora.errors import ConfigError, nearest
from molora.interop.xlora_of_peft import CLASSIFIER, PEFT_TYPE
from molora.layers.banks import banks_of
from molora.layers.linear import MixtureLinear
from molora.layers.mixture import HEAD, Mixture
from molora.model import MixtureModel
from molora.routers import HiddenRouter
from molora.surgery.install import sites_of
from molora.surgery.state import stacks_of, trained_copies

__all__ = ["export_merged", "export_xlora", "mean_gates"]

Weights = Mapping[str, Sequence[float]] | Mapping[str, float] | Sequence[float]
Fixed = tuple[tuple[str, MixtureLinear, tuple[float, ...]], ...]


def _mixture(model: nn.Module, what: str) -> Mixture:
    if not isinstance(model, MixtureModel):
        raise ConfigError(f"{what}: got a plain {type(model).__name__}, expected a model that carries a mixture")
    return model._molora


def export_xlora(model: nn.Module, save_directory: str | os.PathLike[str]) -> None:
    """Write an X-LoRA as PEFT's: classifier and config in the folder, each expert as a PEFT LoRA folder in it.

    Every tensor of the classifier is written, which PEFT's own saving (up to 0.21) does not do. PEFT finds experts by
    number and path, so they are named 0, 1, ... and the config holds absolute paths: after moving the folder, export
    again or edit them. PEFT loads it onto a base with ``config.use_cache = False``. A crash may leave some of the
    experts' folders without the config.

    Raises:
        ConfigError: for a mixture that PEFT's X-LoRA cannot express: another router, whole trained modules, an expert
            without ranks; or that its loader cannot put back (it knows bases whose layers lie under ``model.``).
        CheckpointError: when a folder cannot be written or holds something else.
    """
    mixture, head = _mixture(model, "export_xlora"), getattr(model, HEAD, None)
    placement = mixture.config.placements[0]
    router, gate = placement.router, placement.gate
    if (
        not isinstance(head, HiddenRouter)
        or not isinstance(router, RouterConfig)
        or not isinstance(gate, GateConfig)
        or len(mixture.config.placements) > 1
        or mixture.config.modules_to_save
        or placement.always
    ):
        raise ConfigError(
            f"export_xlora: got recipe {mixture.config.recipe!r}, expected one placement of ready-made adapters "
            "under a model-wide router, without modules_to_save or always-on experts; export_expert writes one expert "
            "of any mixture"
        )
    folder = Path(save_directory)
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    names = [n for n, _ in mixture.config.adapters]
    for e, own in enumerate(_experts(model, names, placement.global_scale)):
        write_peft_lora(folder / str(e), modules=own, base_model_name=base)
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "hidden_size": head.layers[0].in_features,
        "adapters": {str(e): str(folder.resolve() / str(e)) for e in range(len(names))},
        "enable_softmax": gate.activation == "softmax",
        "enable_softmax_topk": gate.renormalize == "softmax",
        "softmax_temperature": gate.temperature,
        "top_k_lora": gate.top_k,
        "layerwise_scalings": router.layerwise,
        "xlora_depth": router.depth,
        "xlora_size": router.size,
        "xlora_dropout_p": router.dropout,
        "scaling_pass_value": router.scaling_pass_value,
        "global_scaling_weight": placement.global_scale,
        "use_trainable_adapters": placement.train_experts,
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"  # PEFT loads the adapters in the order of the file
    listed = "\n".join(f"- {e}: {n}" for e, n in enumerate(names))
    card = f"# X-LoRA in PEFT's format\n\nWritten by molora. Experts, by PEFT's numbers:\n\n{listed}\n"
    save_folder(folder, peft_type=PEFT_TYPE, tensors=_classifier(model, head), describe=lambda _: text, card=card)


def _experts(model: nn.Module, names: Sequence[str], factor: float) -> list[dict[str, Module]]:
    """The modules of each expert, without the factor that all share; ConfigError for what PEFT cannot load."""
    out: list[dict[str, Module]] = [{} for _ in names]
    for path, m in _banks(model):
        assert m.bank is not None
        if not path.startswith("model.") or path.startswith("model.model."):
            raise ConfigError(
                f"export_xlora: got {path}, expected a base whose layers lie under 'model.': PEFT's loader finds the "
                "experts of no other; keep molora's own folder (save_pretrained), or write experts with export_expert"
            )
        for e, own in enumerate(out):
            if m.bank.ranks[e] and factor:
                A, B, scale = m.bank.as_lora(e)
                own[path] = A, B, scale / factor
    empty = [n for n, own in zip(names, out, strict=True) if not own]
    if empty:
        raise ConfigError(
            f"export_xlora: got {empty} without a module, expected ranks in each expert and a global_scaling_weight "
            "other than 0; prune those experts first"
        )
    return out


def _classifier(model: nn.Module, head: HiddenRouter) -> dict[str, Tensor]:
    """The head's linears at the slots of PEFT's Sequential: ReLU, and Dropout if there is any, between them.

    Sites that no expert has ranks on, as pruning leaves them, are no modules of PEFT's and have no gates.
    """
    stride = 3 if head.config.dropout > 0 else 2
    last, used = len(head.layers) - 1, sorted(m.site.index for _, m in _banks(model) if m.bank and any(m.bank.ranks))
    out: dict[str, Tensor] = {}
    for i, layer in enumerate(head.layers):
        weight: Any = layer.weight
        bias: Any = torch.zeros(weight.shape[0]) if layer.bias is None else layer.bias
        if i == last and head.config.layerwise:
            weight, bias = (t.unflatten(0, (-1, head.num_experts))[used].flatten(0, 1) for t in (weight, bias))
        out |= {f"{CLASSIFIER}{stride * i}.weight": weight, f"{CLASSIFIER}{stride * i}.bias": bias}
    return out


def mean_gates(tape: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """The mean weight of each expert over the real tokens of a tape of ``molora.record_routing``, by site.

    For :func:`export_merged`; one value an expert, in the experts' order.

    Raises:
        ConfigError: for a site without any recorded token.
    """
    out = {}
    for path, records in tape.items():
        weights_TE = torch.cat([r.dense()[r.valid] for r in records]) if records else torch.empty(0, 0)
        if not len(weights_TE):
            raise ConfigError(
                f"mean_gates: {path}: the tape holds no real token, expected a forward inside of its block"
            )
        out[path] = tuple(weights_TE.double().mean(0).tolist())
    return out


def export_merged(model: nn.Module, save_directory: str | os.PathLike[str], weights: Weights) -> None:
    """Write the mixture as one PEFT LoRA with the experts at fixed weights: an approximation, as its card says.

    On each linear ``W x + sum_e w_e s_e B_e A_e x``, in float32, with w the same for all tokens; the mixture's own
    weights depend on the token. Where experts are whole feed-forward blocks, the mean of their linears is taken and
    not that of their outputs. The rank is the sum of the ranks of experts with a weight other than 0. Modules trained
    whole (``modules_to_save``) come along.

    ``weights``: one number an expert; or by adapter name (0 for those left out); or what :func:`mean_gates` measured,
    by site, a block's under its leading linear. Experts that are always on keep weight 1.

    Raises:
        ConfigError: for weights that do not name the mixture's experts or sites.
        CheckpointError: when nothing is left, or the folder cannot be written or holds something else.
    """
    mixture = _mixture(model, "export_merged")
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    lead = {m.site.block: m.site.path for _, m in sites_of(model).values() if m.site.block and m.site.lead}
    modules: dict[str, Module] = {}
    for path, m in _banks(model):
        own = (
            (1.0,) * m.site.num_experts if m.always_on else _of_site(mixture, weights, m, lead.get(m.site.block, path))
        )
        assert m.bank is not None
        weighted = [(w, m.bank.as_lora(e)) for e, w in enumerate(own) if w and m.bank.ranks[e]]
        weighted += [(1.0, bank.as_lora(0)) for name, bank in banks_of(m).items() if bank is not m.bank]
        parts = [(A, B, w * scale) for w, (A, B, scale) in weighted]
        if parts:
            A, B = torch.cat([A for A, _, _ in parts]), torch.cat([B.double() * s for _, B, s in parts], dim=1)
            wide = torch.promote_types(A.dtype, torch.float32)  # a scaled B rounds once more in half precision
            modules[path] = (A.to(wide), B.to(wide), 1.0)
    card = (
        f"# One LoRA made of a {mixture.config.recipe} mixture: an approximation\n\n"
        "The mixture weighs its experts anew for each token; here each has one weight for all tokens, so outputs "
        f"differ from the mixture's. Written by molora's export_merged with weights\n\n    {str(weights)[:2000]}\n"
    )
    saved = {path: m.trained.state_dict() for path, m in trained_copies(model).items()}
    write_peft_lora(
        save_directory, modules=modules, base_model_name=base, card=card, fused=stacks_of(model), saved=saved
    )


def _banks(model: nn.Module) -> list[tuple[str, MixtureLinear]]:
    """Path in the base and module of every site with experts of its own."""
    sites = sites_of(model).values()
    return [(path, m) for path, m in sites if isinstance(m, MixtureLinear) and m.bank is not None]


def _of_site(mixture: Mixture, weights: Weights, m: MixtureLinear, lead: str) -> tuple[float, ...]:
    """The weights of one site's experts."""
    names, E = [n for n, _ in mixture.config.adapters], m.site.num_experts
    values: Any = weights
    if isinstance(weights, Mapping):
        unknown = [k for k in weights if k not in names]
        if lead in weights:
            values = weights[lead]
        elif not names or unknown:
            known = names or [lead]
            missing = (unknown or ["nothing"])[0]
            raise ConfigError(
                f"export_merged: weights: got {missing!r}{nearest(missing, known)}, expected names out of "
                f"{', '.join(known[:20])}"
            )
        else:
            values = [weights.get(n, 0.0) for n in names]
    numbers = isinstance(values, Sequence) and all(matches(v, float) for v in values)  # finite, and no bool
    if not numbers or isinstance(values, str) or len(values) != E:
        raise ConfigError(
            f"export_merged: weights: got {str(values)[:200]} for {m.site.path}, expected {E} numbers, one an expert; "
            "where layers have other numbers of experts, give them by site (mean_gates does)"
        )
    return tuple(float(v) for v in values)
