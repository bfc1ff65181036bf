"""The two linear merges: the scaled sum and the mean of task vectors."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lit_merge.functional.scopes import wide

__all__ = ("mean_merge", "sum_merge")


def sum_merge(deltas: Mapping[str, Tensor], scale: float = 0.3) -> dict[str, Tensor]:
    """Sum the task vectors and scale the sum: task arithmetic.

    Every tensor is treated alike, matrices, vectors and embeddings.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        scale: Factor of the sum; 0.3 is the published value for vision transformers.

    Returns:
        Merged task vector, ``(*shape)`` each, at least float32.

    Source: Ilharco et al., Editing Models with Task Arithmetic, section 4, arXiv 2212.04089.

    >>> import torch
    >>> sum_merge({"w": torch.tensor([[1.0, 2.0], [3.0, -2.0]])}, scale=0.5)
    {'w': tensor([2., 0.])}
    """
    return {name: delta.sum(0, dtype=wide(delta[:0]).dtype).mul(scale) for name, delta in deltas.items()}


def mean_merge(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average the task vectors, which averages the experts' weights.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.

    Returns:
        Mean task vector, ``(*shape)`` each, at least float32.

    Source: Wortsman et al., Model soups (uniform soup), arXiv 2203.05482.

    >>> import torch
    >>> mean_merge({"w": torch.tensor([[1.0, 2.0], [3.0, -2.0]])})
    {'w': tensor([2., 0.])}
    """
    return {name: delta.mean(0, dtype=wide(delta[:0]).dtype) for name, delta in deltas.items()}
