"""What the experts themselves say, from their weights: are they alike, and do they bring new directions?

An expert's change of a weight is ``dW_e = s_e B_e A_e``. It is never formed for comparisons: with all ranks side by
side, A (R, I) and B (O, R), the inner products of all experts are sums over blocks of ``(B^T B) * (A A^T)`` (R, R).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molora.errors import ConfigError
from molora.eval.document import plain
from molora.layers.linear import MixtureLinear
from molora.model import MixtureModel
from molora.surgery.install import sites_of

__all__ = ["expert_report", "inner_products", "intruders", "output_similarity", "weight_similarity"]


def _members(ranks: Sequence[int]) -> Tensor:
    """Which rank belongs to which expert, (E, R) of 0 and 1."""
    owner_R = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(list(ranks)))
    return torch.nn.functional.one_hot(owner_R, len(ranks)).T.double()


def inner_products(A_RI: Tensor, B_OR: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """``<dW_e, dW_f>`` for each two experts, (E, E) float64: ``tr(dW_e^T dW_f) = sum((B_e^T B_f) * (A_e A_f^T))``."""
    A, B, of_ER = A_RI.detach().double().cpu(), B_OR.detach().double().cpu(), _members(ranks)
    scale_E = torch.tensor(list(scales), dtype=torch.float64)
    return scale_E.unsqueeze(1) * (of_ER @ ((B.T @ B) * (A @ A.T)) @ of_ER.T) * scale_E


def weight_similarity(A_RI: Tensor, B_OR: Tensor, ranks: Sequence[int], scales: Sequence[float]) -> Tensor:
    """Cosine of the experts' changes as vectors, (E, E) in [-1, 1]; 0 beside an expert that changes nothing."""
    product_EE = inner_products(A_RI, B_OR, ranks, scales)
    norm_E = product_EE.diagonal().clamp_min(0).sqrt()
    scale_EE = norm_E.unsqueeze(1) * norm_E
    return torch.where(scale_EE > 0, product_EE / scale_EE.clamp_min(1e-300), 0.0).clamp(-1, 1)


def output_similarity(x_TI: Tensor, A_RI: Tensor, B_OR: Tensor, ranks: Sequence[int]) -> Tensor:
    """Linear CKA (arXiv 1905.00414, eq. 3) of the experts' outputs ``x A_e^T B_e^T`` on the same tokens, (E, E).

    ``||Y_e^T Y_f||^2 / (||Y_e^T Y_e|| ||Y_f^T Y_f||)`` with centred Y, from products of ranks only:
    ``||Y_e^T Y_f||^2 = sum((G_e C_ef G_f) * C_ef)``, C the scatter of the ranks' values, G = B^T B. 1: the same up to
    a rotation and a scale, which CKA does not see.
    """
    x, A, B = x_TI.detach().double().cpu(), A_RI.detach().double().cpu(), B_OR.detach().double().cpu()
    h_TR = (x - x.mean(0)) @ A.T
    C_RR, G_RR, of_ER = h_TR.T @ h_TR, B.T @ B, _members(ranks)
    own_RR = of_ER.T @ of_ER
    inside_RR = G_RR * own_RR
    squares_EE = of_ER @ ((inside_RR @ C_RR @ inside_RR) * C_RR) @ of_ER.T
    norm_E = squares_EE.diagonal().clamp_min(0).sqrt()
    scale_EE = norm_E.unsqueeze(1) * norm_E
    return torch.where(scale_EE > 0, squares_EE / scale_EE.clamp_min(1e-300), 0.0).clamp(0, 1)


def intruders(W_OI: Tensor, delta_OI: Tensor, first: int = 10, threshold: float = 0.6) -> int:
    """Intruder dimensions (arXiv 2410.21228, algorithm 1): of the ``first`` left singular vectors of ``W + dW``, how
    many have an absolute cosine below ``threshold`` with every left singular vector of W.
    """
    W = W_OI.detach().float()
    before = torch.linalg.svd(W, full_matrices=False).U
    return _strangers(before, W + delta_OI.detach().float(), first, threshold)


def _strangers(before: Tensor, after: Tensor, first: int, threshold: float) -> int:
    now = torch.linalg.svd(after, full_matrices=False).U[:, :first]
    return int(((before.T @ now).abs().amax(0) < threshold).sum())


def expert_report(model: nn.Module, first: int = 10, threshold: float = 0.6) -> dict[str, dict[str, Any]]:
    """By path of each linear with at least two experts: ``cosine`` (E, E), ``norm`` of each change, and ``intruders``
    of each expert alone at full weight (None where the base weight is no plain matrix of the linear's shape, and with
    ``first=0``: they take a singular value decomposition for each expert, which is slow on a large model).

    Raises:
        ConfigError: when the model was not converted.
    """
    if not isinstance(model, MixtureModel):
        raise ConfigError(
            f"expert_report: got a plain {type(model).__name__}, expected a model that convert() returned"
        )
    out: dict[str, dict[str, Any]] = {}
    for _, m in sites_of(model).values():
        if not isinstance(m, MixtureLinear) or m.bank is None or m.site.num_experts < 2:
            continue
        bank, E = m.bank, m.site.num_experts
        A_RI, B_OR, layout = bank.packed()
        packed = A_RI, B_OR, layout.ranks, layout.scales
        norms = inner_products(*packed).diagonal().clamp_min(0).sqrt().tolist()
        found: dict[str, Any] = {
            "cosine": plain(weight_similarity(*packed), 3),
            "norm": plain(norms),
            "intruders": None,
        }
        W_OI = _base_weight(m) if first else None
        if W_OI is not None:
            before = torch.linalg.svd(W_OI, full_matrices=False).U
            found["intruders"] = [
                _strangers(before, W_OI + _change(m, e).to(W_OI.device), first, threshold) for e in range(E)
            ]
        out[m.site.path] = found
    return out


@torch.no_grad()
def _change(m: MixtureLinear, expert: int) -> Tensor:
    assert m.bank is not None
    A_rI, B_Or, scale = m.bank.as_lora(expert)
    return scale * (B_Or.float() @ A_rI.float())


def _base_weight(m: MixtureLinear) -> Tensor | None:
    """W (O, I) in float32; transformers' Conv1D holds it transposed."""
    weight = getattr(m.base_layer, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return None
    W = weight.detach().T if type(m.base_layer).__name__ == "Conv1D" else weight.detach()
    return W.float() if W.shape == (m.site.out_features, m.site.in_features) else None
