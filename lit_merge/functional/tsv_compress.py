"""TSV-C: the experts themselves, each matrix of their task vectors in its leading singular triplets.

Source: Gargiulo et al., section 3.2, arXiv 2412.00081.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.functional.decompositions import Factors
from lit_merge.functional.matrices import MatrixPolicy
from lit_merge.functional.scopes import wide
from lit_merge.functional.tsv import Decompose, decompose_all, kept_rank

__all__ = ("compressed_bytes", "tsv_compress", "tsv_restore")


def tsv_compress(
    deltas: Mapping[str, Tensor],
    *,
    fraction: float | None = None,
    policy: MatrixPolicy | None = None,
    decompose: Decompose | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Factors | Tensor]:
    """Keep the leading singular triplets of every task matrix, and everything else whole.

    k triplets of an m × n matrix take k (m + n + 1) numbers: at k = min(m, n)/T a square matrix shrinks to about 2/T,
    not to 1/T. Where the factors would take more than the matrix itself, as for two tasks, the matrix is kept.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        fraction: Share of min(m, n) that is kept of each task, in (0, 1]; by default 1/T. Published: 0.1 keeps 99 % of
            the experts' accuracy.
        policy: Which tensors are matrices; the others are kept whole.
        decompose: Decomposes one matrix; by default :func:`truncated_svd`.
        dtype: Of what is stored; by default that of the task vectors.

    Returns:
        By name, factors ``(T, m, k)``, ``(T, k)``, ``(T, k, n)``, or the tensor ``(T, *shape)``.

    Raises:
        MergeError: ``fraction`` is out of range.

    >>> compressed = tsv_compress({"w": torch.ones(4, 8, 8), "b": torch.ones(4, 8)})
    >>> compressed["w"].u.shape, compressed["b"].shape, compressed_bytes(compressed)
    (torch.Size([4, 8, 2]), torch.Size([4, 8]), 672)
    """
    policy = policy or MatrixPolicy()
    result: dict[str, Factors | Tensor] = {}
    for name, delta in deltas.items():
        store = delta.dtype if dtype is None else dtype
        result[name] = delta.to(store)
        if policy.covers(name, delta):
            matrices = delta.flatten(2)
            tasks, rows, columns = matrices.shape
            rank = kept_rank(rows, columns, tasks, fraction)
            if rank * (rows + columns + 1) < rows * columns:
                result[name] = Factors(*(part.to(store) for part in decompose_all(matrices, rank, decompose)))
    return result


def tsv_restore(
    compressed: Mapping[str, Factors | Tensor], shapes: Mapping[str, torch.Size], task: int
) -> dict[str, Tensor]:
    """Return the task vector of one task, ``(*shape)`` each; products of factors at least in float32.

    Args:
        compressed: What :func:`tsv_compress` returned.
        shapes: Shapes of the tensors by name.
        task: Its number.

    >>> compressed = tsv_compress({"w": torch.ones(4, 8, 8)})
    >>> torch.allclose(tsv_restore(compressed, {"w": torch.Size([8, 8])}, 0)["w"], torch.ones(8, 8))
    True
    """
    result = {}
    for name, value in compressed.items():
        whole = Factors(*(wide(p[task]) for p in value)).dense() if isinstance(value, Factors) else value[task]
        result[name] = whole.reshape(shapes[name])
    return result


def compressed_bytes(compressed: Mapping[str, Factors | Tensor]) -> int:
    """Return the bytes that compressed task vectors take, all tasks together."""
    return sum(value.nbytes for value in compressed.values())
