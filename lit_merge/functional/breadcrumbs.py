"""Model Breadcrumbs: drop the largest and the smallest changes of every tensor.

Source: Davari and Belilovsky, Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks, section 3,
arXiv 2312.06795.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import check_scope, flat, scopes, share
from lit_merge.functional.selection import order_statistics

__all__ = ("breadcrumbs", "breadcrumbs_bounds", "kept_share")


def breadcrumbs(
    deltas: Mapping[str, Tensor],
    bottom: float = 0.85,
    top: float = 0.007,
    *,
    per: Literal["tensor", "network"] = "tensor",
    bounds: Tensor | None = None,
) -> dict[str, Tensor]:
    """Zero the entries of smallest and of largest magnitude: negligible changes and outliers.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        bottom: Share of entries of smallest magnitude that are dropped, β in the paper, in [0, 1].
        top: Share of entries of largest magnitude that are dropped, 1 − γ in the paper; mergekit's ``gamma``.
        per: Ranks are taken in each ``tensor``, as in the paper, or over all tensors of a task (``network``).
        bounds: What :func:`breadcrumbs_bounds` said, where ``deltas`` is a piece of a network and ``per`` is that.

    Returns:
        Sparse task vectors, ``(T, *shape)`` each. Of d entries ``round((1 − bottom − top) · d)`` stay, and at least
        one: a scalar or a short bias does not vanish. What ties with the first or the last that stays, stays too.

    Raises:
        MergeError: A share is outside [0, 1], or nothing is left between them.

    >>> breadcrumbs({"w": torch.tensor([[9.0, -4.0, 3.0, 0.1, -0.2]])}, bottom=0.4, top=0.2)
    {'w': tensor([[ 0., -4.,  3.,  0.,  0.]])}
    """
    check_scope(per, ("tensor", "network"))
    density = kept_share(bottom, top)
    sparse = {}
    for names in scopes(deltas, per):
        tasks = len(deltas[names[0]]) if names else 0
        if bounds is not None:
            low, high = bounds
        elif found := [_bounds(flat(deltas, names, task), density, top) for task in range(tasks)]:
            low, high = (torch.stack(ends) for ends in zip(*found, strict=True))
        for name in names:
            delta, shape = deltas[name], (-1, *[1] * (deltas[name].ndim - 1))
            inside = (delta.abs() >= low.to(delta).reshape(shape)) & (delta.abs() <= high.to(delta).reshape(shape))
            sparse[name] = torch.where(inside, delta, 0)
    return {name: sparse[name] for name in deltas}


def breadcrumbs_bounds(pieces: Iterable[Mapping[str, Tensor]], bottom: float = 0.85, top: float = 0.007) -> Tensor:
    """Take from a network that is read piece by piece between which magnitudes its entries stay.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time; read twice, four times in float64.
        bottom: See :func:`breadcrumbs`.
        top: See :func:`breadcrumbs`.

    Returns:
        Smallest and largest magnitude per task, ``(2, T)``.

    Raises:
        MergeError: A share is outside [0, 1], or nothing is left between them.

    >>> breadcrumbs_bounds([{"w": torch.tensor([[9.0, -4.0]])}, {"b": torch.tensor([[3.0, 0.1, -0.2]])}], 0.4, 0.2)
    tensor([[3.],
            [4.]])
    """
    density = kept_share(bottom, top)
    return order_statistics(pieces, lambda size: _ranks(size, density, top), magnitudes=True)


def kept_share(bottom: float, top: float) -> float:
    """Return the share of entries that stay.

    Raises:
        MergeError: A share is outside [0, 1], or nothing is left between them.
    """
    density = 1 - share("bottom", bottom, zero=True) - share("top", top, zero=True)
    if bottom + top >= 1:
        raise MergeError(f"breadcrumbs: bottom + top must be below 1, found {bottom} + {top}")
    return density


def _ranks(size: int, density: float, top: float) -> tuple[int, int]:
    """Ranks of the smallest and the largest magnitude that stay."""
    keep = max(1, round(density * size))
    highest = size - min(round(top * size), size - keep)
    return highest - keep + 1, highest


def _bounds(values: Tensor, density: float, top: float) -> tuple[Tensor, Tensor]:
    """Smallest and largest magnitude that stay, of a vector ``(P,)``."""
    if values.numel() == 0:
        return values.new_zeros(()), values.new_zeros(())
    low, high = (values.abs().kthvalue(rank).values for rank in _ranks(values.numel(), density, top))
    return low, high
