"""Task singular vectors: merging by the leading singular triplets of each task, and how much these interfere.

Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, arXiv 2412.00081.

Orthogonalisation has a trap. Where tasks nearly coincide, most directions of the concatenation are small differences,
and the polar factor makes all of them as long as the common ones: for T tasks that are almost one, the merge is √T
times too long and has a cosine of 1/√T with the direction that all of them share. :func:`tsv_merge` warns; ``ridge``
keeps small directions small. Identical tasks are no problem, as directions of length zero are dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import Factors, PolarMethod, polar, truncated_svd
from lit_merge.functional.matrices import MatrixPolicy, merge_matrices
from lit_merge.functional.side_by_side import side_by_side

__all__ = (
    "Decompose",
    "TsvFacts",
    "decompose_all",
    "kept_rank",
    "orthogonalize",
    "singular_task_interference",
    "task_overlap",
    "task_singular_vectors",
    "tsv_merge",
)

Decompose = Callable[[Tensor, int], Factors]
"""Maps a matrix ``(m, n)`` and a rank to its leading triplets: :func:`truncated_svd`, or a cache of it.

It is called from several threads at once."""

_COINCIDE = 0.5  # overlap from which orthogonalisation does more harm than good


class TsvFacts(NamedTuple):
    """What is known of one matrix after its merge.

    Attributes:
        rank: Triplets per task.
        interference: See :func:`singular_task_interference`.
        overlap: See :func:`task_overlap`.
    """

    rank: int
    interference: float
    overlap: float


def kept_rank(rows: int, columns: int, tasks: int, fraction: float | None = None) -> int:
    """Return how many triplets of each task are kept: ⌊min(m, n) / T⌋, at least one.

    Args:
        rows: m.
        columns: n.
        tasks: T.
        fraction: Share of min(m, n) instead of 1/T, in (0, 1].

    Raises:
        MergeError: ``fraction`` is out of range.

    >>> kept_rank(768, 3072, 8), kept_rank(768, 3072, 20), kept_rank(768, 3072, 8, 0.03), kept_rank(4, 3, 8)
    (96, 38, 23, 1)
    """
    if fraction is not None and not 0 < fraction <= 1:
        raise MergeError(f"fraction: expected a share in (0, 1], found {fraction}")
    limit = min(rows, columns)
    return max(1, limit // tasks if fraction is None else int(limit * fraction + 1e-9))


def decompose_all(matrices: Tensor, rank: int, decompose: Decompose | None = None) -> Factors:
    """Decompose the task matrices, side by side on a CPU.

    Args:
        matrices: Task matrices, ``(T, m, n)``.
        rank: Triplets k per task.
        decompose: Decomposes one matrix; by default :func:`truncated_svd`.

    Returns:
        ``u`` ``(T, m, k)``, ``s`` ``(T, k)``, ``vh`` ``(T, k, n)``.
    """
    if decompose is None:
        return truncated_svd(matrices, rank)

    parts = side_by_side(lambda matrix: decompose(matrix, rank), matrices, matrices.device)
    return Factors(*(torch.stack(x) for x in zip(*parts, strict=True)))


def task_singular_vectors(matrices: Tensor, rank: int | None = None, decompose: Decompose | None = None) -> Factors:
    """Concatenate the leading singular triplets of all tasks, task after task.

    Args:
        matrices: Task matrices, ``(T, m, n)``.
        rank: Triplets k per task; by default :func:`kept_rank`.
        decompose: Decomposes one matrix; by default :func:`truncated_svd`.

    Returns:
        ``u`` ``(m, T·k)``, ``s`` ``(T·k,)``, ``vh`` ``(T·k, n)``; triplets that a task does not have are zero.

    >>> u, s, vh = task_singular_vectors(torch.stack([torch.diag(torch.tensor([3.0, 1.0])), 2 * torch.eye(2)]))
    >>> s
    tensor([3., 2.])
    """
    tasks, rows, columns = matrices.shape
    rank = kept_rank(rows, columns, tasks) if rank is None else rank
    u, s, vh = decompose_all(matrices, rank, decompose)
    return Factors(u.transpose(0, 1).flatten(1), s.flatten(), vh.flatten(0, 1))


def orthogonalize(
    factors: Factors, *, ridge: float = 0.0, tolerance: float = 1e-6, method: PolarMethod = "auto"
) -> Factors:
    """Replace ``u`` and ``vh`` by the nearest matrices with orthonormal columns and rows, their polar factors.

    Args:
        factors: Of all tasks, as :func:`task_singular_vectors` returns.
        ridge: See :func:`polar`; the columns are unit vectors, so 0.1 is a tenth of what one task has.
        tolerance: Directions of the concatenation that are dropped, relative to the longest.
        method: See :func:`polar`.

    Returns:
        Factors of the same shapes with the same ``s``.

    Source: section 3.3 (orthogonal Procrustes problem), arXiv 2412.00081.
    """
    nearest = partial(polar, method=method, ridge=ridge, tolerance=tolerance)
    u, vh = side_by_side(nearest, (factors.u, factors.vh), factors.u.device)
    return Factors(u, factors.s, vh)


def singular_task_interference(factors: Factors) -> float:
    """Measure how much the tasks' singular vectors disturb each other: ‖(UᵀU − I) Σ (VᵀV − I)‖₁, entrywise.

    0 if the vectors of different tasks are orthogonal. Its scale is that of the task vectors and grows with T·k:
    compare the layers of one network, or transforms of the same experts.

    Args:
        factors: Of all tasks, as :func:`task_singular_vectors` returns; ``u`` ``(m, R)``, ``s`` ``(R,)``, ``vh``
            ``(R, n)``.

    Source: definition 3.1, arXiv 2412.00081.

    >>> coincide = Factors(torch.ones(1, 2), torch.tensor([3.0, 2.0]), torch.ones(2, 1))
    >>> singular_task_interference(coincide)
    5.0
    """
    present = torch.diag((factors.s > 0).to(factors.u))  # a direction that is not there does not interfere
    left = factors.u.mT @ factors.u - present
    right = factors.vh @ factors.vh.mT - present
    return float(((left * factors.s) @ right).abs().sum(dtype=torch.float64))


def task_overlap(factors: Factors, tasks: int) -> float:
    """Say how far the tasks' subspaces coincide: 0 as independent random ones do on average, 1 if they are the same.

    The mean squared cosine of the principal angles between the kept subspaces of two tasks, corrected for chance (k/m
    for independent subspaces), of left or right vectors, whichever is larger. Negative where tasks avoid each other.

    Args:
        factors: Of all tasks, as :func:`task_singular_vectors` returns.
        tasks: T.

    >>> same = Factors(torch.eye(4)[:, [0, 0]], torch.ones(2), torch.eye(4)[[0, 1]])
    >>> task_overlap(same, 2)
    1.0
    """
    sides = (factors.u, factors.vh.mT)
    return max(_overlap(side, (factors.s > 0).reshape(tasks, -1).sum(1).tolist()) for side in sides)


def _overlap(vectors: Tensor, counts: list[int]) -> float:
    small = vectors.mT @ vectors if vectors.shape[1] <= vectors.shape[0] else vectors @ vectors.mT
    common = float(small.double().square().sum()) - sum(counts)
    pairs = [(a, b) for i, a in enumerate(counts) for j, b in enumerate(counts) if i != j]
    most, chance = sum(min(pair) for pair in pairs), sum(a * b for a, b in pairs) / len(vectors)
    return (common - chance) / (most - chance) if most > chance else 0.0


def tsv_merge(
    deltas: Mapping[str, Tensor],
    scale: float = 1.0,
    *,
    fraction: float | None = None,
    policy: MatrixPolicy | None = None,
    ridge: float = 0.0,
    tolerance: float = 1e-6,
    decompose: Decompose | None = None,
    polar_method: PolarMethod = "auto",
    observe: Callable[[str, TsvFacts], None] | None = None,
) -> dict[str, Tensor]:
    """Merge by TSV-M: M = U⊥ Σ V⊥ᵀ from the leading singular triplets of the tasks, with U⊥ and V⊥ orthogonalised.

    Mutually orthogonal tasks give their sum; one task gives itself. Everything that is not a matrix is averaged, and
    ``scale`` multiplies that too, as in the released code.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        scale: The coefficient α; 1 is the published default.
        fraction: Share of min(m, n) that is kept of each task, in (0, 1]; by default 1/T.
        policy: Which tensors are matrices, and how the others are merged.
        ridge: See :func:`polar`; about 0.1 where experts are alike, 0 as published.
        tolerance: Directions of the concatenation that are dropped, relative to the longest.
        decompose: Decomposes one matrix; by default :func:`truncated_svd`.
        polar_method: See :func:`polar`.
        observe: Is told name and facts of every matrix; measuring them costs some matrix products.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range.

    Warns:
        UserWarning: Tasks nearly coincide and ``ridge`` is 0.

    Source: algorithm 1, arXiv 2412.00081.

    >>> a, b = torch.zeros(2, 2), torch.zeros(2, 2)
    >>> a[0, 0], b[1, 1] = 3.0, 2.0
    >>> tsv_merge({"w": torch.stack([a, b]), "bias": torch.tensor([[1.0], [3.0]])})
    {'w': tensor([[3., 0.],
            [0., 2.]]), 'bias': tensor([2.])}
    """
    alike: dict[str, float] = {}

    def rule(name: str, matrices: Tensor) -> Tensor:
        tasks, rows, columns = matrices.shape
        rank = kept_rank(rows, columns, tasks, fraction)
        factors = task_singular_vectors(matrices, rank, decompose)
        overlap = task_overlap(factors, tasks)
        if overlap > _COINCIDE and not _identical(matrices):
            alike[name] = overlap
        if observe is not None:
            observe(name, TsvFacts(rank, singular_task_interference(factors), overlap))
        return orthogonalize(factors, ridge=ridge, tolerance=tolerance, method=polar_method).dense()

    merged = merge_matrices(deltas, rule, policy, scale)
    if alike and ridge == 0:
        worst = max(alike, key=lambda name: alike[name])
        warnings.warn(
            f"TSV: the tasks nearly coincide in {len(alike)} of {len(deltas)} tensors (most in {worst}, overlap "
            f"{alike[worst]:.2f} of 1), where orthogonalisation blows up their small differences; set ridge to 0.1, or "
            "merge by the mean",
            stacklevel=2,
        )
    return merged


def _identical(matrices: Tensor) -> bool:
    return all(torch.equal(matrices[0], other) for other in matrices[1:])
