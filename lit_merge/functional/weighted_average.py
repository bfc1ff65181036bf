"""The mean of the experts with a weight for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import wide

__all__ = ("normalized", "weighted_average")


def normalized(weights: Sequence[float]) -> list[float]:
    """Divide weights by their sum.

    Raises:
        MergeError: A weight is not finite, or the sum is zero.

    >>> normalized([1, 3])
    [0.25, 0.75]
    """
    check_finite("weights", weights)
    total = float(sum(weights))
    if total == 0:
        raise MergeError(f"weights: expected numbers whose sum is not 0, found {list(weights)}")
    return [weight / total for weight in weights]


def weighted_average(
    deltas: Mapping[str, Tensor], weights: Sequence[float], *, normalize: bool = True
) -> dict[str, Tensor]:
    """Sum the task vectors with one weight each.

    With weights that sum to 1 this averages the experts' weights; the base then plays no part in it.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        weights: One per task.
        normalize: Divide the weights by their sum.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: The number of weights is not T, one is not finite, or their sum is zero.

    Source: Wortsman et al., Model soups, arXiv 2203.05482 (equal weights); mergekit's ``linear``.

    >>> weighted_average({"w": torch.tensor([[4.0, 0.0], [0.0, 8.0]])}, [1, 3])
    {'w': tensor([1., 6.])}
    """
    check_finite("weights", weights)
    shares = normalized(weights) if normalize else list(weights)
    merged = {}
    for name, delta in deltas.items():
        if len(delta) != len(shares):
            raise MergeError(f"weights: expected one for each of {len(delta)} tasks, found {len(shares)}")
        values = wide(delta)
        factors = torch.tensor(shares, dtype=values.dtype, device=values.device)
        merged[name] = torch.tensordot(factors, values, 1)
    return merged
