"""Truncated singular value decompositions and polar factors of task matrices.

=================  ====================================================================================================
``svd``            LAPACK or cuSOLVER on the matrix itself; resolves singular values down to eps · σ_1
``gram``           eigenvectors of the smaller Gram matrix, in float64 where it matters, see
                   :mod:`lit_merge.functional.grams`; resolves down to 1e-7 · σ_1, which is more than ``svd`` does in
                   float32, for less time
``randomized``     range finder with power iterations (Halko et al.); its error is bounded, see
                   :func:`randomized_error_bound`, but its *subspaces* are not those of the exact decomposition
``newton-schulz``  polar factors only: nothing but matrix products in float64, for accelerators
=================  ====================================================================================================

``auto`` is ``gram`` for float32 and below and ``svd`` for float64; for polar factors on an accelerator it is
``newton-schulz``. Several matrices are decomposed side by side on a CPU, and in one batch elsewhere. It is never
``randomized``: where the spectrum is flat at the cut, an approximation within 1 % of the best one can have quite
another subspace, and the orthogonalisation of task singular vectors amplifies the difference (by the inverse of the
smallest singular value of the concatenation).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.grams import eigenvectors, gram, outer, times
from lit_merge.functional.scopes import wide
from lit_merge.functional.side_by_side import side_by_side

__all__ = ("Factors", "PolarMethod", "SvdMethod", "left_basis", "polar", "randomized_error_bound", "truncated_svd")

SvdMethod = Literal["auto", "svd", "gram", "randomized"]
PolarMethod = Literal["auto", "svd", "gram", "newton-schulz"]

_RESOLVED = 1e-7  # of σ_1: the Gram matrix has its square, which float64 still tells from rounding
_WELL = 1e-4  # least λ / λ_1 of a Gram matrix whose inverse root may be multiplied with in float32: κ = 100


class Factors(NamedTuple):
    """Singular triplets: ``u`` ``(…, m, k)``, ``s`` ``(…, k)`` in descending order, ``vh`` ``(…, k, n)``."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def dense(self) -> Tensor:
        """Return the matrices ``(…, m, n)`` again."""
        return (self.u * self.s.unsqueeze(-2)) @ self.vh

    @property
    def nbytes(self) -> int:
        """Bytes of the three factors."""
        return sum(part.nbytes for part in self)


def truncated_svd(
    matrices: Tensor,
    rank: int | None = None,
    method: SvdMethod = "auto",
    *,
    tolerance: float = 1e-6,
    oversampling: int = 16,
    power_iterations: int = 4,
    seed: int = 0,
) -> Factors:
    """Return the leading singular triplets of each matrix.

    A direction with σ ≤ ``tolerance`` · σ_1 is not a direction of the matrix but of its rounding errors: its vectors
    and its σ are zero. So the zero matrix has zero factors, and an update of rank 16 has at most 16 columns that are
    not zero, whatever ``rank`` is.

    Args:
        matrices: ``(…, m, n)``; half precision is computed in float32.
        rank: Triplets k per matrix, in [1, min(m, n)]; by default all.
        method: See :mod:`lit_merge.functional.decompositions`.
        tolerance: Relative to σ_1, in [0, 1); at least 1e-7 acts in ``gram``.
        oversampling: Further columns of the random range finder.
        power_iterations: How often ``randomized`` multiplies by A Aᵀ, with QR in between.
        seed: Of the random directions, which depend on it and on the shape only.

    Returns:
        ``u`` ``(…, m, k)``, ``s`` ``(…, k)``, ``vh`` ``(…, k, n)``, at least in float32.

    Raises:
        MergeError: A value is out of range, or the method is unknown.

    Source of ``randomized``: Halko, Martinsson and Tropp, algorithms 4.4 and 5.1, arXiv 0909.4061.

    >>> u, s, vh = truncated_svd(torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]]), rank=1)
    >>> s, (u * s @ vh).round()
    (tensor([4.]), tensor([[0., 0.],
            [0., 4.],
            [0., 0.]]))
    """
    if matrices.ndim < 2 or 0 in matrices.shape:
        raise MergeError(f"truncated_svd: expected matrices (…, m, n), found shape {tuple(matrices.shape)}")
    limit = min(matrices.shape[-2:])
    rank = limit if rank is None else rank
    if not 1 <= rank <= limit:
        raise MergeError(f"rank: expected 1 to {limit} for {tuple(matrices.shape[-2:])} matrices, found {rank}")
    _check(method, get_args(SvdMethod), tolerance)
    if oversampling < 0 or power_iterations < 0:
        raise MergeError(f"oversampling, power_iterations: expected ≥ 0, found {oversampling}, {power_iterations}")
    route = "randomized" if method == "randomized" else _exact(method, matrices)
    floor = max(tolerance, _RESOLVED) if route == "gram" else tolerance

    def decompose(matrix: Tensor) -> Factors:
        if route == "randomized":
            return _kept(_randomized(wide(matrix), rank, oversampling, power_iterations, seed), floor)
        if route == "gram":
            return _kept(_by_gram(matrix, rank), floor)
        u, s, vh = torch.linalg.svd(wide(matrix), full_matrices=False)
        return _kept(Factors(u[:, :rank], s[:rank], vh[:rank]), floor)

    batch, flat = matrices.shape[:-2], matrices.reshape(-1, *matrices.shape[-2:])
    if matrices.device.type != "cpu" and route == "gram":
        found = _by_grams(flat, rank, floor)
    else:
        parts = side_by_side(decompose, flat, flat.device)
        found = Factors(*(torch.stack(x) for x in zip(*parts, strict=True)))
    return Factors(*(x.reshape(*batch, *x.shape[1:]) for x in found))


def randomized_error_bound(
    singular_values: Tensor, rank: int, oversampling: int = 16, power_iterations: int = 4
) -> float:
    """Bound the expected spectral error ‖A − A_k‖ of ``randomized`` from the singular values of A.

    σ_{k+1} + [(1 + √(k/(p−1))) σ_{k+1}^{2q+1} + e √(k+p)/p · (Σ_{j>k} σ_j^{2(2q+1)})^{1/2}]^{1/(2q+1)}; the best
    possible error is σ_{k+1}.

    Args:
        singular_values: All of them, ``(min(m, n),)``.
        rank: k.
        oversampling: p, at least 2.
        power_iterations: q.

    Raises:
        MergeError: ``oversampling`` is less than 2.

    Source: Halko et al., theorem 9.3 and corollary 10.10, arXiv 0909.4061.

    >>> round(randomized_error_bound(torch.tensor([9.0, 1.0, 1.0]), 1, oversampling=2, power_iterations=50), 2)
    2.02
    """
    if oversampling < 2:
        raise MergeError(f"oversampling: the bound needs at least 2, found {oversampling}")
    tail = singular_values.double().sort(descending=True).values[rank:]
    if not len(tail) or tail[0] == 0:
        return 0.0
    power = 2 * power_iterations + 1
    energy = float((tail / tail[0]).pow(2 * power).sum().sqrt())
    inside = 1 + math.sqrt(rank / (oversampling - 1)) + math.e * math.sqrt(rank + oversampling) / oversampling * energy
    return float(tail[0]) * (1 + math.pow(inside, 1 / power))


def polar(matrix: Tensor, method: PolarMethod = "auto", *, ridge: float = 0.0, tolerance: float = 1e-6) -> Tensor:
    """Return the polar factor U Vᵀ of a matrix U Σ Vᵀ: the nearest one with orthonormal columns (or rows).

    Args:
        matrix: ``(m, n)``.
        method: ``svd``, whose error in float32 is about 1e-6 · κ with the condition number κ = σ_1 / σ_n; ``gram``,
            by eigenvectors of the smaller Gram matrix, about 1e-6 whatever κ is, up to 1e7; ``newton-schulz``, the
            scaled cubic iteration in float64, about 1e-6 too, which falls back to ``gram`` if it does not converge
            because directions are missing.
        ridge: With λ > 0, A (AᵀA + λI)^{-1/2} instead: a singular value σ becomes σ / √(σ² + λ), so that what is
            nearly zero is not inflated to 1. Relative to the length of the columns where these are unit vectors.
        tolerance: Directions with σ ≤ ``tolerance`` · σ_1 are dropped: the factor is a partial isometry.

    Returns:
        ``(m, n)``, at least in float32.

    Raises:
        MergeError: A value is out of range, or the method is unknown.

    Source: Higham, Functions of Matrices, chapter 8, on the polar decomposition; Chen and Chow, A stable scaling of
    Newton-Schulz for improving the sign function computation, 2014, on the iteration.

    >>> polar(torch.tensor([[0.0, 2.0], [0.5, 0.0]]))
    tensor([[0., 1.],
            [1., 0.]])
    >>> polar(torch.tensor([[2.0, 0.0], [0.0, 0.1]]), ridge=0.03)
    tensor([[0.9963, 0.0000],
            [0.0000, 0.5000]])
    """
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise MergeError(f"polar: expected a matrix (m, n), found shape {tuple(matrix.shape)}")
    _check(method, get_args(PolarMethod), tolerance)
    if not (ridge >= 0 and math.isfinite(ridge)):
        raise MergeError(f"ridge: expected a number ≥ 0, found {ridge}")
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.mT, method, ridge=ridge, tolerance=tolerance).mT
    if method == "auto" and matrix.device.type != "cpu":
        method = "newton-schulz"
    dtype = wide(matrix[:0]).dtype
    if method == "newton-schulz" and (found := _newton_schulz(matrix.double(), ridge, tolerance)) is not None:
        return found.to(dtype)
    if _exact(method, matrix) == "svd":
        u, s, vh = torch.linalg.svd(wide(matrix), full_matrices=False)
        factor: Tensor = (u * torch.where(s > tolerance * s[0], s * (s.square() + ridge).rsqrt(), 0)) @ vh
        return factor
    # a random matrix is well conditioned if it is twice as tall as wide, and never if it is square
    values, vectors = eigenvectors(gram(matrix), matrix.shape[1], single=matrix.shape[0] >= 2 * matrix.shape[1])
    kept = values > max(tolerance, _RESOLVED) ** 2 * values[-1].clamp(min=0)
    inverse = torch.where(kept, (values + ridge).clamp(min=torch.finfo(values.dtype).tiny).rsqrt(), 0)
    root = outer(vectors, inverse.to(vectors.dtype))
    if dtype == torch.float32 and bool(values[0] > _WELL * values[-1]):
        return times(matrix, root.float(), dtype)
    return times(matrix, root, dtype)


def left_basis(matrices: Tensor, *, tolerance: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors and singular values of matrices side by side, [A_1 … A_T].

    Args:
        matrices: ``(T, m, n)``.
        tolerance: Directions with σ ≤ ``tolerance`` · σ_1 are left out; at least 1e-7 acts below float64.

    Returns:
        ``(m, r)`` and ``(r,)`` in descending order, at least in float32; r = 0 if all matrices are zero. Below float64
        only a sum of Gram matrices ``(m, m)`` is decomposed, however many matrices there are.

    Raises:
        MergeError: The tolerance is out of range.

    >>> left_basis(torch.tensor([[[3.0], [0.0]], [[4.0], [0.0]]]))[1]
    tensor([5.])
    """
    _check("gram", get_args(SvdMethod), tolerance)
    if matrices.dtype == torch.float64:
        u, s, _ = torch.linalg.svd(matrices.transpose(0, 1).flatten(1), full_matrices=False)
    else:
        tolerance = max(tolerance, _RESOLVED)
        total = matrices.new_zeros(matrices.shape[1], matrices.shape[1], dtype=torch.float64)
        for matrix in matrices:
            total += gram(matrix.mT)
        values, vectors = torch.linalg.eigh(total)
        u, s = vectors.flip(1).to(wide(matrices[:0]).dtype), values.clamp(min=0).sqrt().flip(0).to(torch.float32)
    kept = s > tolerance * s[0]
    return u[:, kept], s[kept]


def _check(method: str, known: tuple[str, ...], tolerance: float) -> None:
    if method not in known:
        raise MergeError(f"method: expected {', '.join(known)}, found {method!r}")
    if not 0 <= tolerance < 1:
        raise MergeError(f"tolerance: expected a share in [0, 1), found {tolerance}")


def _exact(method: str, matrix: Tensor) -> str:
    """Return what ``auto`` means: in float64 the Gram matrix would lose half of the digits."""
    return ("svd" if matrix.dtype == torch.float64 else "gram") if method == "auto" else method


def _kept(found: Factors, floor: float) -> Factors:
    """Zero the triplets that are rounding errors, in place or not; ``(…, m, k)`` and so on."""
    kept = (found.s > floor * found.s[..., :1]).to(found.s)
    return Factors(found.u * kept.unsqueeze(-2), found.s * kept, found.vh * kept.unsqueeze(-1))


def _by_gram(matrix: Tensor, rank: int) -> Factors:
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _by_gram(matrix.mT, rank)
        return Factors(vh.mT, s, u.mT)
    return _left(matrix, eigenvectors(gram(matrix), rank)[1].flip(1))


def _by_grams(matrices: Tensor, rank: int, floor: float) -> Factors:
    """The same for ``(B, m, n)`` with one batched eigendecomposition in float64, as accelerators want it."""
    if matrices.shape[1] < matrices.shape[2]:
        u, s, vh = _by_grams(matrices.mT, rank, floor)
        return Factors(vh.mT, s, u.mT)
    vectors = torch.linalg.eigh(torch.stack([gram(matrix) for matrix in matrices])).eigenvectors
    parts = [_left(a, v[:, -rank:].flip(1)) for a, v in zip(matrices, vectors, strict=True)]
    return _kept(Factors(*(torch.stack(x) for x in zip(*parts, strict=True))), floor)


def _left(tall: Tensor, v: Tensor) -> Factors:
    """Return the triplets of right singular vectors ``(n, k)``."""
    scaled = times(tall, v, v.dtype)
    s = scaled.norm(dim=0)  # more accurate than roots of eigenvalues
    u = scaled / s.clamp(min=torch.finfo(s.dtype).tiny)
    dtype = wide(tall[:0]).dtype
    return Factors(u.to(dtype), s.to(dtype), v.mT.to(dtype))


def _randomized(matrix: Tensor, rank: int, oversampling: int, power_iterations: int, seed: int) -> Factors:
    width = min(rank + oversampling, *matrix.shape)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(matrix.shape[1], width, generator=generator, dtype=matrix.dtype).to(matrix.device)
    basis = torch.linalg.qr(matrix @ start).Q
    for _ in range(power_iterations):  # an odd power of A: one product without QR would lose the small directions
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
    u, s, vh = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
    return Factors(basis @ u[:, :rank], s[:rank], vh[:rank])


def _newton_schulz(tall: Tensor, ridge: float, tolerance: float) -> Tensor | None:
    """Iterate X ← aX (3 − a² XᵀX) / 2; ``None`` if a direction is too small to converge.

    a² = 3 / (1 + l + l²) makes the ends of [l, 1] equal. l is kept from going below 0.01: with a larger a, what is
    near 1 would cancel to a number near rounding, and a tiny value grows by 2.6 a step either way.
    """
    size = len(tall)
    if ridge > 0:  # the polar factor of [A; √λ I] has A (AᵀA + λI)^{-1/2} on top
        corner = math.sqrt(ridge) * torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
        tall = torch.cat([tall, corner])
    norms = [float(torch.linalg.matrix_norm(tall, p)) for p in ("fro", 1, math.inf)]
    bound = min(norms[0], math.sqrt(norms[1] * norms[2]))  # of σ_1
    if bound == 0:
        return None
    x, lowest = tall / bound, max(tolerance, 1e-8)
    eye = torch.eye(tall.shape[1], dtype=tall.dtype, device=tall.device)
    while lowest < 1 - 1e-9:
        end = max(lowest, 0.01)
        a = math.sqrt(3 / (1 + end + end * end))
        x = x @ torch.addmm(eye, x.mT, x, beta=1.5 * a, alpha=-0.5 * a**3)
        lowest = 0.5 * a * lowest * (3 - (a * lowest) ** 2)
    defect = torch.linalg.matrix_norm(x.mT @ x - eye) / math.sqrt(len(eye))
    return x[:size] if defect < 1e-6 else None
