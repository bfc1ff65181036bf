"""KnOTS: task matrices written in one basis before a rule that works entry by entry merges them.

Source: Stoica et al., Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import left_basis
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.ties import ties_merge

__all__ = ("Aligned", "align", "knots")


class Aligned(NamedTuple):
    """Task matrices in their common basis: τ_t = ``basis`` · ``parts[t]``.

    Attributes:
        basis: U, ``(m, r)``, orthonormal.
        parts: Σ V_tᵀ of each task, or V_tᵀ with U Σ as basis, ``(T, r, n)``.
    """

    basis: Tensor
    parts: Tensor


def align(matrices: Tensor, *, weighted: bool = True, tolerance: float = 1e-6) -> Aligned:
    """Decompose the task matrices side by side, [τ_1 … τ_T] = U Σ [V_1ᵀ … V_Tᵀ].

    Updates of rank q (LoRA)
    have at most T·q common directions, and the parts as many rows.

    Args:
        matrices: Task matrices, ``(T, m, n)``.
        weighted: The parts are Σ V_tᵀ, as in the released configurations, so that entries count as much as they weigh;
            or V_tᵀ, in which all directions count alike.
        tolerance: Directions with σ ≤ ``tolerance`` · σ_1 are dropped; at least 1e-7 acts below float64.

    Returns:
        Basis and parts, at least in float32.

    Source: equation 3, arXiv 2410.19735.

    >>> import torch
    >>> basis, parts = align(torch.tensor([[[3.0], [0.0]], [[4.0], [0.0]]]))
    >>> basis.abs(), parts.abs()
    (tensor([[1.],
            [0.]]), tensor([[[3.]],
    <BLANKLINE>
            [[4.]]]))
    """
    u, s = left_basis(matrices, tolerance=tolerance)
    parts = u.mT @ matrices.to(u.dtype)
    return Aligned(u, parts) if weighted else Aligned(u * s, parts / s[:, None])


def knots(
    deltas: Mapping[str, Tensor],
    scale: float = 0.6,
    *,
    density: float = 0.2,
    weighted: bool = True,
    rule: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None,
    policy: MatrixPolicy | None = None,
    tolerance: float = 1e-6,
) -> dict[str, Tensor]:
    """Merge by KnOTS: align the task matrices, merge the aligned parts by TIES, and go back.

    The parts of all matrices together are trimmed, as TIES does with a network. A linear rule commutes with the basis:
    the mean of aligned parts is the mean of the task vectors.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        scale: The coefficient, which multiplies tensors that are not matrices too; 0.6 is the released value for LoRA
            of rank 16 on ViT-B/32 and 8 tasks.
        density: Share of entries that stay in the trimming of TIES, in (0, 1].
        weighted: See :func:`align`.
        rule: Merges ``{name: (T, r, n)}`` to ``{name: (r, n)}``; by default TIES with disjoint mean and ``density``.
        policy: Which tensors are matrices, and how the others are merged. The released code only knows LoRA updates.
        tolerance: See :func:`align`.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range.

    Source: section 4, arXiv 2410.19735; the released configurations of KnOTS-TIES.

    >>> import torch
    >>> two = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 2.0]]])
    >>> knots({"w": two}, 1.0, density=1.0)["w"].round(decimals=4)
    tensor([[2., 0.],
            [0., 2.]])
    """
    if not 0 < density <= 1:
        raise MergeError(f"density: expected a share in (0, 1], found {density}")
    policy = policy or MatrixPolicy()
    aligned = {
        name: align(delta.flatten(2), weighted=weighted, tolerance=tolerance)
        for name, delta in deltas.items()
        if policy.covers(name, delta)
    }
    parts = {name: value.parts for name, value in aligned.items() if value.parts.numel()}  # it is empty if all is zero
    merged = rule(parts) if rule is not None else ties_merge(parts, density)
    result = {}
    for name, delta in deltas.items():
        if name in parts:
            result[name] = scale * (aligned[name].basis @ merged[name]).reshape(delta.shape[1:])
        else:
            result[name] = scale * policy.merge_other(delta)
    return result
