"""The two products of a step: coefficients times task vectors, and a gradient times task vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lit_merge.functional import contraction_cuda

__all__ = ("inner_products", "weighted_sum")

_FARTHEST = 2**31 - 1
_BLOCK = 2**16  # entries that are converted at once, so that they stay in the cache; a divisor of a streamed piece


def weighted_sum(
    rows: Tensor, weights: Tensor, base: Tensor | None = None, types: Sequence[torch.dtype] = ()
) -> Tensor:
    """Return base + Σ_t w_t · row_t in one pass over the rows, computed in the dtype of the weights.

    Args:
        rows: ``(T, n)``, in any floating dtype.
        weights: ``(T,)``.
        base: ``(n,)``, in the dtype of the weights; by default zeros.
        types: Dtypes that the result is rounded to, one after the other; by default it stays in that of the weights.

    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.tensor([1.0, 0.5]), torch.ones(2))
    tensor([3.5000, 2.0000])
    """
    end = types[-1] if types else weights.dtype
    direct = {*types} <= {end, weights.dtype}  # rounded once
    if direct and contraction_cuda.usable(rows, weights.dtype, end, *([] if base is None else [base.dtype])):
        return contraction_cuda.weighted_sum(rows, weights, base, end)
    same = all(dtype == weights.dtype for dtype in types)
    if rows.device.type != "cpu" or (rows.dtype == weights.dtype and same):
        wide = _near(rows.to(weights.dtype))
        found = wide.T.mv(weights) if base is None else torch.addmv(base, wide.T, weights)
        return _through(found, types)
    result = torch.empty(rows.shape[1], dtype=end)
    room = torch.empty(min(rows.shape[1], _BLOCK), dtype=weights.dtype)
    for part, wide in _widened(rows, weights.dtype):
        one = result[part] if same else room[: wide.shape[1]]
        if base is None:
            torch.mv(wide.T, weights, out=one)
        else:
            torch.addmv(base[part], wide.T, weights, out=one)
        if not same:
            result[part] = _through(one, types[:-1])
    return result


def inner_products(rows: Tensor, vector: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return ⟨row_t, vector⟩ ``(T,)`` in one pass over the rows.

    Args:
        rows: ``(T, n)``, in any floating dtype.
        vector: ``(n,)``, in any floating dtype.
        dtype: Of the arithmetic and of the result; by default that of the vector.

    >>> inner_products(torch.tensor([[1.0, 2.0], [3.0, -2.0]]), torch.ones(2))
    tensor([3., 1.])
    """
    dtype = dtype or vector.dtype
    if dtype == torch.float32 and contraction_cuda.usable(rows, vector.dtype):
        return contraction_cuda.inner_products(rows, vector)
    if rows.device.type != "cpu" or rows.dtype == vector.dtype == dtype:
        return _near(rows.to(dtype)).mv(vector.to(dtype))
    result = torch.zeros(len(rows), dtype=dtype)
    for part, wide in _widened(rows, dtype):
        result += wide.mv(vector[part].to(dtype))
    return result


def _widened(rows: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Columns of a matrix in a wider dtype, a cacheful at a time."""
    size = rows.shape[1]
    same = rows.dtype == dtype
    room = rows if same else torch.empty(len(rows), min(size, _BLOCK), dtype=dtype)
    for start in range(0, size, _BLOCK):
        part = slice(start, min(start + _BLOCK, size))
        if same:
            yield part, rows[:, part]
        else:
            yield part, room[:, : part.stop - start].copy_(rows[:, part])


def _near(rows: Tensor) -> Tensor:
    """Rows that BLAS takes: it counts the entries from one to the next, those of a whole network, in 32 bits."""
    return rows if rows.stride(0) <= _FARTHEST else rows.clone(memory_format=torch.contiguous_format)


def _through(value: Tensor, types: Sequence[torch.dtype]) -> Tensor:
    for dtype in types:
        value = value.to(dtype)
    return value
