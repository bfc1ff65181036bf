"""The two products of a step: coefficients times task vectors, and a gradient times task vectors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ("inner_products", "weighted_sum")

_BLOCK = 2**16  # entries that are widened at once, so that they stay in the cache; a divisor of a streamed piece


def weighted_sum(rows: Tensor, weights: Tensor, base: Tensor | None = None) -> Tensor:
    """Return base + Σ_t w_t · row_t in the dtype of the weights, in one pass over the rows.

    Args:
        rows: ``(T, n)``, in any floating dtype.
        weights: ``(T,)``.
        base: ``(n,)``, in the dtype of the weights; by default zeros.

    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([1.0, 0.5]), torch.ones(2))
    tensor([3.5000, 2.0000])
    """
    if rows.dtype == weights.dtype:
        return rows.T.mv(weights) if base is None else torch.addmv(base, rows.T, weights)
    if rows.device.type != "cpu":
        return weighted_sum(rows.to(weights.dtype), weights, base)
    result = torch.empty(rows.shape[1], dtype=weights.dtype)
    for part, wide in _widened(rows, weights.dtype):
        result[part] = weighted_sum(wide, weights, None if base is None else base[part])
    return result


def inner_products(rows: Tensor, vector: Tensor) -> Tensor:
    """Return ⟨row_t, vector⟩ ``(T,)`` in the dtype of the vector, in one pass over the rows.

    Args:
        rows: ``(T, n)``, in any floating dtype.
        vector: ``(n,)``.

    >>> inner_products(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.ones(2))
    tensor([3., 1.])
    """
    if rows.dtype == vector.dtype:
        return rows.mv(vector)
    if rows.device.type != "cpu":
        return rows.to(vector.dtype).mv(vector)
    result = torch.zeros(len(rows), dtype=vector.dtype)
    for part, wide in _widened(rows, vector.dtype):
        result += wide.mv(vector[part])
    return result


def _widened(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns of a matrix in a wider dtype, a cacheful at a time."""
    size = rows.shape[1]
    room = torch.empty(len(rows), min(size, _BLOCK), dtype=dtype)
    for start in range(0, size, _BLOCK):
        part = slice(start, min(start + _BLOCK, size))
        wide = room[:, : part.stop - start]
        yield part, wide.copy_(rows[:, part])
