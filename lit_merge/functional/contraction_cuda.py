"""The products of :mod:`lit_merge.functional.contraction` as Triton kernels, for half precision on CUDA.

PyTorch's own products want rows, coefficients and result in one type: with task vectors in half precision they are
first copied to float32, which writes and reads three times what the task vectors take. Here each entry is read once,
widened in a register, and the result is written in the type that is asked for. Sums are in float32, and in an order
that depends on shapes only.

The arithmetic is tested against the plain products by Triton's interpreter; the speed on a GPU has not been measured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton comes with PyTorch for CUDA, and not with others
    triton = None

__all__ = ("inner_products", "usable", "weighted_sum")

_HALF = (torch.bfloat16, torch.float16)
_BLOCK = 1024


def usable(rows: Tensor, *others: torch.dtype) -> bool:
    """Whether the kernels are for this: half precision on CUDA, with entries one after the other.

    Args:
        rows: ``(T, n)``.
        others: Types of everything else: at least one type is half precision, and none is float64.

    >>> usable(torch.zeros(2, 3, dtype=torch.bfloat16), torch.float32)  # on a CPU
    False
    """
    types = {rows.dtype, *others}
    return (
        triton is not None
        and rows.device.type == "cuda"
        and rows.stride(1) == 1
        and bool(types & set(_HALF))
        and types <= {*_HALF, torch.float32}
    )


def weighted_sum(rows: Tensor, weights: Tensor, base: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return base + Σ_t w_t · row_t.

    Args:
        rows: ``(T, n)``, in half precision or float32; rows may be apart, as slices of a wider matrix are.
        weights: ``(T,)``, float32.
        base: ``(n,)``, in half precision or float32; ``None`` for zeros.
        dtype: Of the result.
    """
    tasks, size = rows.shape
    result = torch.empty(size, dtype=dtype, device=rows.device)
    if size:
        with _on(rows.device):
            _sum[(triton.cdiv(size, _BLOCK),)](
                rows, weights.contiguous(), result if base is None else base, result,
                tasks, size, rows.stride(0), base is not None, _BLOCK,
            )  # fmt: skip
    return result


def inner_products(rows: Tensor, vector: Tensor) -> Tensor:
    """Return ⟨row_t, vector⟩ ``(T,)``, float32.

    Args:
        rows: ``(T, n)``, in half precision or float32; rows may be apart, as slices of a wider matrix are.
        vector: ``(n,)``, in half precision or float32.
    """
    tasks, size = rows.shape
    parts = torch.zeros(tasks, triton.cdiv(size, _BLOCK), device=rows.device)
    if size:
        with _on(rows.device):
            _products[(parts.shape[1],)](
                rows, vector.contiguous(), parts, tasks, size, rows.stride(0), parts.stride(0), _BLOCK
            )
    return parts.sum(1)


def _on(device: torch.device) -> Any:  # noqa: ANN401 - a context
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _sum(rows, weights, base, result, tasks, size, stride, has_base: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        # a block of entries per program; the row pointer moves on by the stride, which cannot overflow 32 bits so
        places = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = places < size
        total = tl.zeros((block,), dtype=tl.float32)
        if has_base:
            total += tl.load(base + places, mask=inside, other=0.0).to(tl.float32)
        row = rows + places
        for task in range(tasks):
            total += tl.load(weights + task) * tl.load(row, mask=inside, other=0.0).to(tl.float32)
            row += stride
        tl.store(result + places, total.to(result.dtype.element_ty), mask=inside)

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _products(rows, vector, parts, tasks, size, stride, parts_stride, block: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        # partial sums per program instead of atomic additions, whose order would change from run to run
        number = tl.program_id(0)
        places = number.to(tl.int64) * block + tl.arange(0, block)
        inside = places < size
        piece = tl.load(vector + places, mask=inside, other=0.0).to(tl.float32)
        row, part = rows + places, parts + number
        for _ in range(tasks):
            tl.store(part, tl.sum(piece * tl.load(row, mask=inside, other=0.0).to(tl.float32), 0))
            row += stride
            part += parts_stride
