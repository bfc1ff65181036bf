"""Isotropic merging: the sum of the task vectors with a flat spectrum.

Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, arXiv
2502.04959.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import Factors, PolarMethod, SvdMethod, polar, truncated_svd
from lit_merge.functional.matrices import MatrixPolicy, merge_matrices
from lit_merge.functional.scopes import wide
from lit_merge.functional.side_by_side import side_by_side

__all__ = ("common_rank", "iso_c", "iso_cts")


def iso_c(
    deltas: Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    policy: MatrixPolicy | None = None,
    tolerance: float = 1e-6,
    polar_method: PolarMethod = "auto",
) -> dict[str, Tensor]:
    """Merge by Iso-C: σ̄ U Vᵀ, where U Σ Vᵀ is the sum of the task matrices and σ̄ the mean of its singular values.

    U Vᵀ is the polar factor of the sum and σ̄ its inner product with the sum over min(m, n), so no singular vector is
    needed. Where the sum has no direction at all, a plain decomposition fills in arbitrary ones; these stay zero here.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        scale: The coefficient α, which multiplies the averaged tensors too. Published for 8 tasks: 1.0 (ViT-B/32), 1.4
            (B/16), 1.5 (L/14); FusionBench has 1.5 in its tables for B/32.
        policy: Which tensors are matrices, and how the others are merged.
        tolerance: Directions with σ ≤ ``tolerance`` · σ_1 stay zero; σ̄ is over all min(m, n) either way.
        polar_method: See :func:`polar`.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range.

    Source: algorithm 1, arXiv 2502.04959.

    >>> iso_c({"w": torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])})
    {'w': tensor([[3., 0.],
            [0., 3.]])}
    """

    def rule(name: str, matrices: Tensor) -> Tensor:
        total = matrices.sum(0, dtype=wide(matrices[:0]).dtype)
        factor = polar(total, polar_method, tolerance=tolerance)
        mean: Tensor = torch.linalg.vecdot(factor, total).sum(dtype=torch.float64) / min(total.shape)
        return factor.mul_(mean.to(factor.dtype))

    return merge_matrices(deltas, rule, policy, scale)


def common_rank(rows: int, columns: int, tasks: int, fraction: float = 0.8) -> tuple[int, int]:
    """Return the sizes of the common subspace and of each task's: ``(k, s)`` with k + T · s = min(m, n).

    The rest beside the common share is rounded to a multiple of T, to the even one in the middle.

    >>> common_rank(768, 768, 8), common_rank(5, 9, 3)
    ((616, 19), (5, 0))
    """
    limit = min(rows, columns)
    specific = round((limit - int(limit * fraction)) / tasks)
    if limit - specific * tasks < 0:  # more tasks than directions
        specific = limit // tasks
    return limit - specific * tasks, specific


def iso_cts(
    deltas: Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    common: float = 0.8,
    policy: MatrixPolicy | None = None,
    tolerance: float = 1e-6,
    method: SvdMethod = "auto",
    polar_method: PolarMethod = "auto",
) -> dict[str, Tensor]:
    """Merge by Iso-CTS: the leading subspace of the sum, filled up by directions of single tasks, with a flat spectrum.

    1. The first k singular triplets of the sum of the task matrices: the common subspace.
    2. Of each task the first s triplets of τ_t − U_k U_kᵀ τ_t, what the common left vectors do not span.
    3. All of them, orthogonalised as in TSV-M, with the mean of all their singular values as the one value.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        scale: The coefficient α, which multiplies the averaged tensors too.
        common: Share of the common subspace, in [0, 1]; see :func:`common_rank`.
        policy: Which tensors are matrices, and how the others are merged.
        tolerance: Directions that are dropped, relative to the longest, in decompositions and orthogonalisation.
        method: See :func:`truncated_svd`.
        polar_method: See :func:`polar`.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range.

    Source: algorithm 2, arXiv 2502.04959; 0.8 as published.

    >>> merged = iso_cts({"w": torch.tensor([[[4.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 2.0]]])})
    >>> merged["w"].round(decimals=4)
    tensor([[3., 0.],
            [0., 3.]])
    """
    if not 0 <= common <= 1:
        raise MergeError(f"common: expected a share in [0, 1], found {common}")

    def rule(name: str, matrices: Tensor) -> Tensor:
        tasks, rows, columns = matrices.shape
        shared, specific = common_rank(rows, columns, tasks, common)
        total = matrices.sum(0, dtype=wide(matrices[:0]).dtype)
        whole = truncated_svd(total, None if rows <= columns else max(shared, 1), method, tolerance=tolerance)
        head = Factors(whole.u[:, :shared], whole.s[:shared], whole.vh[:shared])
        # what the common vectors leave is rows − shared dimensional: where the other left vectors of the sum span it,
        # a few rows are decomposed instead of the matrix
        rest = whole.u[:, shared:] if rows <= columns and bool((whole.s > 0).all()) else None

        def tail_of(matrix: Tensor) -> Factors:
            return _tail(matrix.to(total.dtype), head.u, rest, specific, method, tolerance)

        tails = side_by_side(tail_of, matrices, matrices.device)
        tail = Factors(
            torch.cat([part.u for part in tails], dim=1),
            torch.cat([part.s for part in tails]),
            torch.cat([part.vh for part in tails]),
        )
        # the common left vectors are orthonormal, and orthogonal to all others
        left = polar(tail.u, polar_method, tolerance=tolerance) if specific else tail.u
        right = polar(torch.cat([tail.vh, head.vh]), polar_method, tolerance=tolerance)
        mean = torch.cat([tail.s, head.s]).mean()
        return mean * (torch.cat([left, head.u], dim=1) @ right)

    return merge_matrices(deltas, rule, policy, scale)


def _tail(
    matrix: Tensor, common: Tensor, rest: Tensor | None, rank: int, method: SvdMethod, tolerance: float
) -> Factors:
    """Return the leading triplets of a matrix ``(m, n)`` without what is in the span of ``common``."""
    if not rank:
        return Factors(matrix[:, :0], matrix[0, :0], matrix[:0])
    if rest is None:
        u, s, vh = truncated_svd(matrix - common @ (common.mT @ matrix), rank, method, tolerance=tolerance)
        u = u - common @ (common.mT @ u)  # what rounding left of them, which counts where little is left of the matrix
    else:
        u, s, vh = truncated_svd(rest.mT @ matrix, rank, method, tolerance=tolerance)
        u = rest @ u
    # relative to the task matrix: of one within the common subspace nothing but rounding is left
    kept = (s > max(tolerance, 1e-6) * torch.linalg.matrix_norm(matrix)).to(s)
    return Factors(u * kept, s * kept, vh * kept[:, None])
