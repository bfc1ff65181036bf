"""Norms and spectra of task vectors beside those of the other experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_merge.auditing.robust import robust_z
from lit_merge.task_vectors import TaskVectors

__all__ = ("leading_share", "task_vector_outliers")

_LEAST = 0.02  # a difference of two per cent of a norm or of a share means nothing
_TINY = 1e-30


def leading_share(matrices: Tensor) -> Tensor:
    """Return the share of a matrix's energy that its largest singular value has: σ1² / Σ σ_i².

    It is the inverse of the stable rank: 1 for a matrix of rank one, 1/n for an orthogonal one of n rows.

    Args:
        matrices: ``(..., rows, columns)``.

    Returns:
        Shares ``(...)`` in (0, 1], in float64; NaN for a matrix of zeros, which has no direction.

    >>> leading_share(torch.diag(torch.tensor([3.0, 1.0, 0.0]))).item()
    0.9
    """
    values = matrices.double()
    rows, columns = values.shape[-2:]
    gram = values @ values.mT if rows <= columns else values.mT @ values  # the smaller of the two has all of σ²
    energies: Tensor = torch.linalg.eigvalsh(gram)
    return energies[..., -1] / energies.sum(-1).where(energies.sum(-1) > 0, torch.nan)


@torch.no_grad()
def task_vector_outliers(bank: TaskVectors) -> dict[str, dict[str, Any]]:
    """Say how norm and spectrum of every task vector differ from those of the other experts.

    All z-scores are robust (:func:`~lit_merge.auditing.robust.robust_z`) and over the experts, of logarithms, as norms
    and shares differ by factors. Tensors of one row or column have no spectrum; others of more than two dimensions are
    matrices of their first dimension times the rest.

    Args:
        bank: Task vectors of T experts.

    Returns:
        Per task: ``norm`` of the whole task vector and ``norm_z``; ``tensor_z``, the largest z-score of the norm of a
        single tensor, and ``tensor``, its name; ``stable_rank``, the mean of ‖τ_l‖² / σ1(τ_l)² over the matrices, and
        ``rank_z`` of its inverse, so that concentrated spectra have large ones; ``leading_z``, the largest z-score of
        one matrix's :func:`leading_share`, and ``leading``, its name. ``None`` where the network has no matrix.

    >>> experts = {name: {"w": torch.eye(2) * size} for name, size in (("a", 1.0), ("b", 1.1), ("c", 9.0))}
    >>> found = task_vector_outliers(TaskVectors.from_state_dicts({"w": torch.zeros(2, 2)}, experts))
    >>> [round(row["norm_z"], 1) for row in found.values()], found["c"]["stable_rank"]
    ([-0.7, 0.0, 14.9], 2.0)
    """
    norms, shares, matrices = [], [], []
    for name, delta in bank.deltas.items():
        flat = delta.detach().double().flatten(1) if delta.ndim > 1 else delta.detach().double()[:, None]
        norms.append(flat.norm(dim=1))
        if delta.ndim > 2 and min(delta.shape[1], flat.shape[1] // max(delta.shape[1], 1)) > 1:
            matrices.append(name)
            # a task vector of zeros is no outlier in direction: it counts as spread out evenly
            rank = min(delta.shape[1], flat.shape[1] // delta.shape[1])
            shares.append(torch.stack([leading_share(one.flatten(1)) for one in delta]).nan_to_num(1 / rank))
    by_tensor = torch.stack(norms, dim=1).cpu()  # (T, L)
    whole = by_tensor.norm(dim=1)
    whole_z, tensor_z = _log_z(whole), _log_z(by_tensor)
    rows: dict[str, dict[str, Any]] = {}
    for t, task in enumerate(bank.tasks):
        place = int(tensor_z[t].argmax())
        rows[task] = {
            "norm": float(whole[t]), "norm_z": float(whole_z[t]),
            "tensor": bank.names[place], "tensor_z": float(tensor_z[t, place]),
            "stable_rank": None, "rank_z": None, "leading": None, "leading_z": None,
        }  # fmt: skip
    if matrices:
        by_matrix = torch.stack(shares, dim=1).cpu()
        ranks = (1 / by_matrix).mean(dim=1)
        rank_z, leading_z = _log_z(1 / ranks), _log_z(by_matrix)
        for t, task in enumerate(bank.tasks):
            place = int(leading_z[t].argmax())
            rows[task] |= {
                "stable_rank": float(ranks[t]), "rank_z": float(rank_z[t]),
                "leading": matrices[place], "leading_z": float(leading_z[t, place]),
            }  # fmt: skip
    return rows


def _log_z(values: Tensor) -> Tensor:
    """Robust z-scores of logarithms; zeros count as very small."""
    # tensors that no expert changed are equal, so their scores are 0
    return robust_z(values.clamp(min=_TINY).log(), _LEAST)
