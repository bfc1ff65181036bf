"""Gram matrices and their eigenvectors, in float64 where it matters and in float32 where it does not.

The eigenvectors of AᵀA are the right singular vectors of A, for a fraction of the time of a singular value
decomposition, and the condition number is squared. In float32 the error of a direction is eps · λ_1 / λ, so a few
strong directions spoil all weak ones, which is what updates of low rank plus noise look like. Block power iteration
finds these few in float64 in little time; what is left after them is flat, and float32 is good enough for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ("eigenvectors", "gram", "outer", "times")

_ROWS = 512  # that are widened to float64 at once
_PANELS = 4  # 10 of 16 blocks are computed, the others are their transposes
_STRONG = 32  # directions that are looked for in float64
_READINGS = 6  # of the Gram matrix by the power iteration
_RESIDUAL = 1e-8  # relative to the eigenvalue, of a direction that is taken out
_FLAT = 64.0  # largest λ / smallest that is needed, for float32: an error of 32 · eps in a singular vector
_SPREAD = 1e8  # largest λ_1 / λ, for float32: a strong direction is in a weak vector by 1e-8 · λ_1 / λ at worst
_LEAST = 256  # rows from which float32 is worth the trouble


def gram(tall: Tensor) -> Tensor:
    """Return AᵀA in float64, without a float64 copy of A.

    Args:
        tall: A, ``(m, n)``.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    tensor([[ 1.,  2.],
            [ 2., 13.]], dtype=torch.float64)
    """
    size = tall.shape[1]
    result = tall.new_zeros(size, size, dtype=torch.float64)
    for rows in tall.split(_ROWS):
        piece = rows.double()
        for begin, end in _panels(size):
            result[begin:, begin:end].addmm_(piece[:, begin:].mT, piece[:, begin:end])
    return _mirrored(result)


def outer(vectors: Tensor, weights: Tensor) -> Tensor:
    """Return V · diag(w) · Vᵀ for weights w ≥ 0, ``(n, n)``.

    Args:
        vectors: V, ``(n, r)``.
        weights: w, ``(r,)``.

    >>> outer(torch.tensor([[1.0], [2.0]]), torch.tensor([0.25]))
    tensor([[0.2500, 0.5000],
            [0.5000, 1.0000]])
    """
    half = vectors * weights.sqrt()
    result = half.new_empty(len(half), len(half))
    for begin, end in _panels(len(half)):
        torch.mm(half[begin:], half[begin:end].mT, out=result[begin:, begin:end])
    return _mirrored(result)


def times(tall: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A · B, computed in the type of B, without a copy of A or of the result in that type.

    Args:
        tall: A, ``(m, n)``.
        right: B, ``(n, k)``.
        dtype: Type of the result.
    """
    result = tall.new_empty(tall.shape[0], right.shape[1], dtype=dtype)
    for rows, out in zip(tall.split(_ROWS), result.split(_ROWS), strict=True):
        if right.dtype == dtype:
            torch.mm(rows.to(dtype), right, out=out)
        else:
            out.copy_(rows.to(right.dtype) @ right)
    return result


def eigenvectors(matrix: Tensor, count: int, *, single: bool = True) -> tuple[Tensor, Tensor]:
    """Return the largest eigenvalues of a Gram matrix and their eigenvectors.

    Args:
        matrix: AᵀA in float64, ``(n, n)``; it is overwritten.
        count: How many, in [1, n].
        single: Whether to try float32. It is taken only if the eigenvalues that are left after the strongest
            directions differ by less than a factor of 64 down to the last that is asked for, and λ_1 is at most 1e8
            times the last; the relative error of a singular vector is then a few 1e-6, divided by its relative distance
            to the next ones, which is less than that of a singular value decomposition in float32 where σ_1 is much
            larger than the last.

    Returns:
        Values ``(count,)`` in float64, in increasing order; vectors ``(n, count)``, in float32 or float64.

    >>> eigenvectors(torch.tensor([[2.0, 0.0], [0.0, 5.0]], dtype=torch.float64), 1)[0]
    tensor([5.], dtype=torch.float64)
    """
    size = len(matrix)
    if single and size >= _LEAST and (found := _mostly_single(matrix, count)) is not None:
        return found
    values, vectors = torch.linalg.eigh(matrix)
    return values[size - count :], vectors[:, size - count :]


def _mostly_single(matrix: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Strong directions in float64, the others in float32; ``None`` if these are not flat enough, or nothing is there.

    The strong ones are orthogonal to the rest up to the residual over the eigenvalue, whatever the power iteration has
    found: any eigenvector may be taken out, not only the largest ones.
    """
    size = len(matrix)
    values, strong = _strong_directions(matrix)
    rest = matrix.to(torch.float32) if not len(values) else _without(matrix, values, strong)
    weak, vectors = torch.linalg.eigh(rest)
    left = count - len(values)
    least = 0.0 if left <= 0 else float(weak[size - left])
    if not float(weak[-1]) < _FLAT * least or (len(values) and float(values[-1]) > _SPREAD * least):
        return None
    both = torch.cat([weak[size - left :].double(), values])
    order = both.argsort(stable=True)
    return both[order], torch.cat([vectors[:, size - left :], strong.float()], dim=1)[:, order]


def _strong_directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(len(matrix), _STRONG, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(matrix @ start.to(matrix.device)).Q
    for _ in range(_READINGS - 2):
        basis = torch.linalg.qr(matrix @ basis).Q
    image = matrix @ basis
    values, turn = torch.linalg.eigh(basis.mT @ image)
    vectors = basis @ turn
    residual = torch.linalg.vector_norm(image @ turn - vectors * values, dim=0)
    found = (values > 0) & (residual <= _RESIDUAL * values)
    return values[found], vectors[:, found]


def _without(matrix: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Return the matrix less some of its eigenvectors, in float32; by rows, so that no copy in float64 is made."""
    result = matrix.new_empty(matrix.shape, dtype=torch.float32)
    scaled = (vectors * values).mT
    for rows, left, out in zip(matrix.split(_ROWS), vectors.split(_ROWS), result.split(_ROWS), strict=True):
        out.copy_(torch.addmm(rows, left, scaled, alpha=-1))
    return result


def _panels(size: int) -> list[tuple[int, int]]:
    width = max(64, -(-size // _PANELS))
    return [(begin, min(begin + width, size)) for begin in range(0, size, width)]


def _mirrored(lower: Tensor) -> Tensor:
    for begin, end in _panels(len(lower)):
        lower[begin:end, end:].copy_(lower[end:, begin:end].mT)
    return lower
