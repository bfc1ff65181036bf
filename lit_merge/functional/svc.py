"""SVC: singular values of a merge that were counted once per task, calibrated.

Source: Li et al., When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging, arXiv 2602.05536.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import SvdMethod, truncated_svd
from lit_merge.functional.finite import check_finite
from lit_merge.functional.matrices import MatrixPolicy

__all__ = ("calibration_factors", "svc")


def calibration_factors(merged: Tensor, deltas: Tensor, left: Tensor, alpha: float = 0.1) -> Tensor:
    """Factor of every singular value: γ_r = T / Σ_t max(α, s_r^t).

    s_r^t = ⟨u_rᵀ Δ, u_rᵀ τ_t⟩ / ‖u_rᵀ τ_t‖² says how many times task t's share of direction r is in the merge: 1 is
    right, T if all tasks have the same share and it was summed up. A task without a share in a direction counts as α.

    Args:
        merged: Merged task vector Δ, ``(m, n)``.
        deltas: Task vectors τ, ``(T, m, n)``.
        left: Left singular vectors u of Δ as columns, ``(m, r)``.
        alpha: Least s, above 0: γ is at most 1 / α.

    Returns:
        γ, ``(r,)``.

    >>> delta = torch.tensor([[4.0, 0.0], [0.0, 1.0]])  # the sum of diag(2, 1) and diag(2, 0)
    >>> tasks = torch.stack([torch.tensor([2.0, 1.0]).diag(), torch.tensor([2.0, 0.0]).diag()])
    >>> calibration_factors(delta, tasks, torch.eye(2))  # 2 / (2 + 2), 2 / (1 + 0.1)
    tensor([0.5000, 1.8182])
    """
    response = left.mT @ merged
    total = torch.zeros_like(response[:, 0])
    for delta in deltas:
        own = left.mT @ delta.to(left.dtype)
        square = own.square().sum(1)
        found = (response * own).sum(1) / square.clamp_min(1e-12)
        total += torch.where(square > 0, found, alpha).clamp_min(alpha)
    return len(deltas) / total


def svc(
    merged: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    alpha: float = 0.1,
    exclude: Sequence[str] = (),
    decomposition: SvdMethod = "auto",
) -> dict[str, Tensor]:
    """Calibrate the singular values of merged matrices; their singular vectors, and all other tensors, stay.

    No data is needed: the task vectors tell what was counted how often.

    Args:
        merged: Merged task vector, ``(*shape)`` each, of any merge.
        deltas: Task vectors, ``(T, *shape)`` each.
        alpha: Least projection coefficient, above 0; 0.1 is that of the tables for CLIP. Larger ones shrink more.
        exclude: Names or patterns of matrices that stay as they are.
        decomposition: See :func:`~lit_merge.functional.truncated_svd`.

    Returns:
        Calibrated task vector, ``(*shape)`` each.

    Raises:
        MergeError: ``alpha`` is not above 0, or names differ.

    Source: arXiv 2602.05536, equation 8 and the calibration after it.

    >>> tasks = {"w": torch.stack([torch.tensor([2.0, 1.0]).diag(), torch.tensor([2.0, 0.0]).diag()])}
    >>> svc({"w": tasks["w"].sum(0)}, tasks, alpha=0.5)["w"].diag()  # 4 · 2 / (2 + 2), 1 · 2 / (1 + 0.5)
    tensor([2.0000, 1.3333])
    """
    check_finite("alpha", alpha, above=0)
    if set(merged) != set(deltas):
        raise MergeError(f"svc: merge and task vectors differ in {', '.join(sorted(set(merged) ^ set(deltas)))}")
    policy, result = MatrixPolicy(exclude=exclude), {}
    for name, value in merged.items():
        if not policy.covers(name, deltas[name]):
            result[name] = value.clone()
            continue
        wide = value.double()
        left = truncated_svd(wide, method=decomposition).u
        factors = calibration_factors(wide, deltas[name], left, alpha)
        change = (left * (factors - 1)) @ (left.mT @ wide)  # what lies outside of the singular vectors stays
        result[name] = (wide + change).to(torch.promote_types(value.dtype, torch.float32))
    return result
