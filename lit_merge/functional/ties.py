"""TIES: trim, elect signs, merge what agrees.

Source: Yadav et al., TIES-Merging, section 4 and algorithm 1, arXiv 2306.01708.
All tensors of a task form one vector: trimming is global, so a tensor that changed little may vanish.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import wide

__all__ = ("disjoint_mean_merge", "elect_signs", "ties", "trim")


def trim(deltas: Mapping[str, Tensor], density: float = 0.2) -> dict[str, Tensor]:
    """Keep the entries of largest magnitude of every task, over all its tensors together, and zero the rest.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share of entries that stay, in (0, 1]; ``round(density * d)`` of d, and whatever ties with the last.

    Returns:
        Trimmed task vectors, ``(T, *shape)`` each.

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> import torch
    >>> trim({"w": torch.tensor([[1.0, -4.0, 2.0, 0.5]])}, density=0.5)
    {'w': tensor([[ 0., -4.,  2.,  0.]])}
    """
    if not 0 < density <= 1:
        raise MergeError(f"density: expected a share in (0, 1], found {density}")
    thresholds = _thresholds(deltas, density)
    return {
        name: torch.where(delta.abs() >= thresholds.to(delta).reshape(-1, *[1] * (delta.ndim - 1)), delta, 0)
        for name, delta in deltas.items()
    }


def _thresholds(deltas: Mapping[str, Tensor], density: float) -> Tensor:
    """Magnitude of the last entry that stays, per task: ``(T,)``."""
    tasks = len(next(iter(deltas.values()))) if deltas else 0
    rows = []
    for task in range(tasks):  # one task at a time: the flat copy is one model, not T
        flat = torch.cat([delta[task].abs().flatten() for delta in deltas.values()])
        keep = max(1, round(density * flat.numel()))
        rows.append(flat.kthvalue(flat.numel() - keep + 1).values)
    return torch.stack(rows) if rows else torch.empty(0)


def elect_signs(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Elect one sign per entry: that of the sum over tasks.

    Entries whose sum is exactly zero take the majority sign of all entries of the network (positive if that is
    balanced too), as in the released code; the paper leaves the case open.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.

    Returns:
        Signs, +1 or -1, ``(*shape)`` each.

    >>> import torch
    >>> elect_signs({"w": torch.tensor([[1.0, -4.0, 2.0], [2.0, 1.0, -2.0]])})
    {'w': tensor([ 1., -1.,  1.])}
    """
    signs = {name: delta.sum(0).sign() for name, delta in deltas.items()}
    balance = sum(float(sign.sum()) for sign in signs.values())
    majority = -1.0 if balance < 0 else 1.0
    return {name: torch.where(sign == 0, majority, sign) for name, sign in signs.items()}


def ties(deltas: Mapping[str, Tensor], density: float = 0.2) -> dict[str, Tensor]:
    """Trim each task vector and zero the entries whose sign lost the election.

    The result is still one vector per task: its sum is the TIES merge with disjoint sum, and
    :func:`disjoint_mean_merge` of it the published one with disjoint mean.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share of entries that stay in trimming, in (0, 1]; 0.2 is the published value.

    Returns:
        Task vectors, ``(T, *shape)`` each, whose entries agree in sign across tasks.

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> import torch
    >>> ties({"w": torch.tensor([[5.0, -4.0, 0.1, 0.2], [3.0, 6.0, 0.2, 0.1]])}, density=0.5)
    {'w': tensor([[5., 0., 0., 0.],
            [3., 6., 0., 0.]])}
    """
    trimmed = trim(deltas, density)
    signs = elect_signs(trimmed)
    return {name: torch.where(delta.sign() == signs[name], delta, 0) for name, delta in trimmed.items()}


def disjoint_mean_merge(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Average each entry over the tasks in which it is not zero.

    Args:
        deltas: Sparse task vectors, ``(T, *shape)`` each, such as :func:`ties` returns.

    Returns:
        Merged task vector, ``(*shape)`` each, at least float32; zero where every task is zero.

    >>> import torch
    >>> disjoint_mean_merge({"w": torch.tensor([[5.0, 0.0, 0.0], [3.0, 6.0, 0.0]])})
    {'w': tensor([4., 6., 0.])}
    """
    return {
        name: delta.sum(0, dtype=wide(delta[:0]).dtype) / (delta != 0).sum(0).clamp(min=1)
        for name, delta in deltas.items()
    }
