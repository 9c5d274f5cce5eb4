"""Any PEFT adapter that changes the weights of linears, as a plain LoRA folder of a chosen rank.

An adapter whose layer computes ``y = W' x + b`` is the base plus the change ``D = W' - W``, whatever formula made W'
(DoRA: ``W' = m (W + s B A) / |W + s B A|`` by row). The nearest matrix of rank r is the truncated SVD of D
(Eckart-Young). An adapter that started with part of W moved into A and B (PiSSA, OLoRA) is right on the residual
``W - s B0 A0`` only; D, taken from the true W, holds that too, at twice the rank.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from molora.adapter.atomic_save import CONFIG, CONFIG_LIMIT, WEIGHTS
from molora.adapter.names import PREFIX
from molora.adapter.peft_lora import HEADER_LIMIT
from molora.adapter.peft_lora_config import PEFT_TYPE, check_start
from molora.adapter.peft_lora_writer import write_peft_lora
from molora.adapter.safetensors_file import TensorFile
from molora.adapter.strict_json import read_object
from molora.config.strict import shown
from molora.errors import AdapterError, ConfigError
from molora.extras import FAULTS
from molora.interop.conversion_report import ConversionReport, ModuleError
from molora.interop.merged import Probe, changes, linear_weight, load_adapter, model_output, probes, told, wide_copy
from molora.model import MixtureModel
from molora.surgery.targets import candidates

__all__ = ["to_lora"]

# How far a merged weight's outputs may be from the layer's own, of the change and of the whole output, in float32.
MERGE_RTOL, MERGE_ATOL = 1e-3, 1e-5

Factors = tuple[Tensor, Tensor]  # A (r, I), B (O, r)


@torch.no_grad()
def to_lora(
    base_model: nn.Module,
    folder: str | os.PathLike[str],
    out_folder: str | os.PathLike[str],
    *,
    rank: int | float,
    inputs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> ConversionReport:
    """Write the PEFT adapter in ``folder`` as a LoRA folder, ready for ``adapters={name: out_folder}``.

    PEFT reads the folder and runs its method on a copy of the base, in float32, which needs the memory for that;
    ``base_model`` itself is not touched. The factors are those of PEFT's own conversion where the method has one, else
    the truncated SVD of D. LoRA and its variants always take the second way: PEFT's conversion reads A and B alone and
    leaves out DoRA's magnitudes and the residual of PiSSA and OLoRA.

    On a half-precision base, numbers that the adapter took from it in that precision (the norms that DoRA's magnitudes
    start from) keep their rounding, up to ``2^-9 |W|`` by row in bfloat16, which then counts as part of D.

    Args:
        base_model: the plain base that the adapter was trained on, unquantised.
        folder: an adapter folder of PEFT. ``out_folder``: where the LoRA goes, in float32.
        rank: an int, the most ranks of each module; or a float in (0, 1], the share of ``|D|^2`` to keep, as in PEFT
            (1.0: all of it). Factors that PEFT knows exactly (MiSS) are taken as they are where they fit.
        inputs: keyword arguments of the model's forward. Outputs are then compared on what reaches each module, and
            the whole model's output too; without them on standard normal vectors drawn from ``seed``.

    Returns:
        The relative errors of each module and of all, measured on the factors as written; ``print`` shows a table.

    Raises:
        AdapterError: for what no change of linears' weights can say: methods that do not merge (prompt and prefix
            tuning, adaption prompts, routers), trained biases, norms, embeddings and whole modules; for an initialiser
            whose residual the folder does not determine; for an adapter of another base.
        ConfigError: for a quantised, converted or empty (meta) base; a rank out of range; inputs that the base cannot
            run; PEFT not installed.
    """
    folder = Path(folder)
    _check(base_model, rank)
    if Path(out_folder).resolve() == folder.resolve():
        raise ConfigError(f"to_lora: got out_folder={str(out_folder)!r}, the adapter's own; expected another folder")
    kind = _kind(folder)
    model = wide_copy(base_model)
    base_out = None if inputs is None else _base_output(model, inputs)
    adapted = load_adapter(model, folder)
    with told(folder, f"{kind} cannot be run on inputs alone"):
        probed = probes(base_model, model, inputs, seed)
        adapter_out = None if inputs is None else model_output(adapted, inputs)
    with told(folder, f"PEFT cannot convert its {kind}"):
        factors = {} if kind == PEFT_TYPE else _peft_factors(adapted, rank, probed)
    with told(folder, f"{kind} cannot be merged into weights, so no fixed matrix says what it does"):
        merged = adapted.merge_and_unload()
    errors, modules, routes = [], {}, set()
    for path, D_OI in changes(base_model, merged, folder).items():
        route, A_rI, B_Or = _chosen(factors.get(path), D_OI, rank)
        base = base_model.get_submodule(path)
        errors.append(_error(folder, base, path, D_OI, (A_rI, B_Or), probed.get(path)))
        linear_weight(merged.get_submodule(path)).copy_(linear_weight(base) + B_Or @ A_rI)
        modules[path] = (A_rI, B_Or, 1.0)
        routes.add(route)
    off = None
    if inputs is not None and adapter_out is not None and base_out is not None:
        size = float((adapter_out - base_out).norm())
        off = float((model_output(merged, inputs) - adapter_out).norm()) / size if size else 0.0
    name = getattr(base_model, "name_or_path", None)
    write_peft_lora(out_folder, modules=modules, base_model_name=name)
    return ConversionReport(str(folder), kind, " and ".join(sorted(routes)), tuple(errors), off)


def _check(model: nn.Module, rank: int | float) -> None:
    if isinstance(model, MixtureModel):
        raise ConfigError("to_lora: got a converted model, expected the plain base; call model.unload() first")
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
        raise ConfigError(f"rank: got {shown(rank)}, expected an int of at least 1, or a float in (0, 1]")
    if any(t.device.type == "meta" for t in model.parameters()):
        raise ConfigError("to_lora: got a model on the meta device, expected one with its weights")
    weights = {p: getattr(model.get_submodule(p), "weight", None) for p in candidates(model)}
    packed = [p for p, w in weights.items() if isinstance(w, Tensor) and not w.is_floating_point()]
    if packed or getattr(model, "quantization_method", None) is not None:
        raise ConfigError(
            f"to_lora: got a quantised base{f' ({packed[0]})' if packed else ''}, whose weights cannot hold a change "
            "as small as an adapter's; load it unquantised for this step (the LoRA then serves the quantised one too)"
        )


def _base_output(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    try:
        return model_output(model, inputs)
    except FAULTS as e:
        got = f"{type(e).__name__}: {str(e)[:300]}"
        raise ConfigError(
            f"to_lora: inputs: the base cannot run them ({got}); expected arguments of its forward"
        ) from e


def _kind(folder: Path) -> str:
    """The folder's ``peft_type``; refuses what its config says cannot be converted."""
    try:
        config = read_object(folder / CONFIG, CONFIG_LIMIT)
    except (FileNotFoundError, NotADirectoryError) as e:
        raise AdapterError(f"{folder}: there is no {CONFIG}; expected a PEFT adapter folder") from e
    try:
        TensorFile(folder / WEIGHTS, header_limit=HEADER_LIMIT).load()  # PEFT would add NaN, and says little of damage
    except FileNotFoundError as e:
        raise AdapterError(f"{folder}: there is no {WEIGHTS}; expected a PEFT adapter folder with its weights") from e
    if config.get("modules_to_save"):
        raise AdapterError(
            f"{folder}: got modules_to_save={shown(config['modules_to_save'])}, expected none: whole trained modules "
            "cannot be mixed; train them with molora's own modules_to_save"
        )
    check_start(folder / CONFIG, config, merges=True)
    return str(config.get("peft_type"))[:100]


def _peft_factors(adapted: Any, rank: int | float, probed: Mapping[str, Probe]) -> dict[str, Factors]:
    """PEFT's own conversion, by path; nothing where the method has none or a linear has fewer ranks than asked."""
    from peft.tuners.lora.conversion import convert_to_lora

    widths = [min(x_NI.shape[1], y_NO.shape[1]) for x_NI, y_NO in probed.values()]
    if (isinstance(rank, int) and rank > min(widths, default=rank)) or not adapted.supports_lora_conversion():
        return {}
    _, state = convert_to_lora(adapted, rank)
    names = {k.removesuffix(".lora_A.weight") for k in state if k.endswith(".lora_A.weight")}
    return {
        n.removeprefix(PREFIX): (state[f"{n}.lora_A.weight"].float(), state[f"{n}.lora_B.weight"].float())
        for n in names
    }


def _chosen(theirs: Factors | None, D_OI: Tensor, rank: int | float) -> tuple[str, Tensor, Tensor]:
    """(route, A, B): PEFT's where they keep to the rank, else the truncated SVD, ``A = V_r^T``, ``B = U_r S_r``."""
    if theirs is not None and (isinstance(rank, float) or theirs[0].shape[0] <= rank):
        return "peft", *theirs
    U_OK, S_K, Vh_KI = torch.linalg.svd(D_OI, full_matrices=False)
    r = rank
    if isinstance(r, float):
        kept_K = S_K.double().square().cumsum(0)
        r = int(torch.searchsorted(kept_K, r * kept_K[-1])) + 1
    return "difference", Vh_KI[:r].contiguous(), (U_OK[:, :r] * S_K[:r]).contiguous()


def _error(
    folder: Path, base: nn.Module, path: str, D_OI: Tensor, factors: Factors, probe: Probe | None
) -> ModuleError:
    """The errors of one module; AdapterError where the adapter's own layer is not the map of its merged weight."""
    A_rI, B_Or = factors
    delta_OI = B_Or @ A_rI
    off = size = 0.0
    if probe is not None:
        x_NI, y_NO = probe
        bias = getattr(base, "bias", None)
        base_NO = x_NI @ linear_weight(base).to(x_NI.dtype).T + (0 if bias is None else bias.to(x_NI.dtype))
        change_NO = y_NO - base_NO
        apart = (change_NO - x_NI @ D_OI.T).norm()
        if apart > MERGE_RTOL * change_NO.norm() + MERGE_ATOL * y_NO.norm():
            raise AdapterError(
                f"{folder}: {path}: its layer gives other outputs than its merged weight ({float(apart):.3g} of "
                f"{float(change_NO.norm()):.3g} apart), so no fixed matrix says what it does"
            )
        off, size = _square(change_NO - x_NI @ delta_OI.T), _square(change_NO)
    return ModuleError(path, A_rI.shape[0], _square(D_OI - delta_OI), _square(D_OI), off, size)


def _square(t: Tensor) -> float:
    return float(t.double().square().sum())
