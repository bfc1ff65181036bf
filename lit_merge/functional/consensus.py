"""TALL masks say what of a merged vector belongs to a task; Consensus merging keeps what several tasks need.

Source: Wang et al., Localizing Task Information for Improved Model Merging and Compression, sections 3 and 4,
arXiv 2405.07813.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.finite import check_finite
from lit_merge.functional.scopes import wide

__all__ = ("consensus_mask", "consensus_merge", "tall_masks")


def tall_masks(
    deltas: Mapping[str, Tensor],
    threshold: float | Sequence[float] = 0.4,
    *,
    multi_task: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Say of each entry of the multi-task vector whether it is for a task: |τ_t| ≥ λ_t |τ_MTL − τ_t|.

    θ0 + mask_t ⊙ τ_MTL is then close to expert t: one vector and T masks of a bit per entry instead of T experts.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        threshold: λ, at least 0, one for all tasks or one per task; the higher, the sparser. The paper chooses it per
            task from 0.2, 0.3 … 0.6 on validation data; the middle is the default.
        multi_task: τ_MTL, ``(*shape)`` each; by default the sum of the task vectors.

    Returns:
        Masks, boolean, ``(T, *shape)`` each.

    Raises:
        MergeError: A threshold is negative, or there is not one per task.

    >>> tall_masks({"w": torch.tensor([[4.0, 1.0], [1.0, -2.0]])}, 0.5)["w"]  # sum: 5, -1
    tensor([[ True,  True],
            [False,  True]])
    """
    return {name: _tall(delta, threshold, _of(multi_task, name)) for name, delta in deltas.items()}


def consensus_mask(
    deltas: Mapping[str, Tensor],
    threshold: float | Sequence[float] = 0.4,
    least: int = 2,
    *,
    multi_task: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Keep the entries that are in the TALL masks of at least some tasks.

    What is in no mask ("catastrophic" in the paper) or in one alone ("selfish") is dropped by ``least=2``.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        threshold: λ of :func:`tall_masks`.
        least: Number k of masks, from 1 to T; 2 is the published value.
        multi_task: τ_MTL; by default the sum of the task vectors.

    Returns:
        Mask, boolean, ``(*shape)`` each.

    Raises:
        MergeError: ``least`` is out of range, or the threshold is.

    >>> consensus_mask({"w": torch.tensor([[4.0, 1.0], [1.0, -2.0]])}, 0.5)["w"]
    tensor([False,  True])
    """
    masks = {}
    for name, delta in deltas.items():
        if not 1 <= least <= len(delta):
            raise MergeError(f"least: expected from 1 to {len(delta)}, the number of tasks, found {least}")
        masks[name] = _tall(delta, threshold, _of(multi_task, name)).sum(0) >= least
    return masks


def consensus_merge(
    deltas: Mapping[str, Tensor],
    scale: float = 0.3,
    threshold: float | Sequence[float] = 0.4,
    least: int = 2,
    *,
    multi_task: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Scale the multi-task vector after dropping what fewer than ``least`` tasks need.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        scale: Factor α of the result; tuned on validation data in the paper, here that of task arithmetic.
        threshold: λ of :func:`tall_masks`.
        least: Number of tasks that must need an entry, see :func:`consensus_mask`.
        multi_task: τ_MTL: by default the sum of the task vectors (Consensus TA); a TIES merge makes it Consensus TIES.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: A value is out of range.

    >>> consensus_merge({"w": torch.tensor([[4.0, 1.0], [1.0, -2.0]])}, 0.5, 0.5)
    {'w': tensor([ 0.0000, -0.5000])}
    """
    masks = consensus_mask(deltas, threshold, least, multi_task=multi_task)
    merged = {}
    for name, delta in deltas.items():
        vector = _of(multi_task, name)
        vector = wide(delta).sum(0) if vector is None else wide(vector)
        merged[name] = torch.where(masks[name], scale * vector, 0)
    return merged


def _of(multi_task: Mapping[str, Tensor] | None, name: str) -> Tensor | None:
    return None if multi_task is None else multi_task[name]


def _tall(delta: Tensor, threshold: float | Sequence[float], multi_task: Tensor | None) -> Tensor:
    """Masks of one tensor, ``(T, *shape)``."""
    given = [threshold] * len(delta) if isinstance(threshold, int | float) else list(threshold)
    check_finite("threshold", given, least=0)
    if len(given) != len(delta):
        raise MergeError(f"threshold: expected a number or {len(delta)}, one per task, at least 0, found {threshold}")
    delta = wide(delta)
    whole = delta.sum(0) if multi_task is None else wide(multi_task)
    limits = torch.tensor(given, dtype=delta.dtype, device=delta.device).reshape(-1, *[1] * (delta.ndim - 1))
    return delta.abs() >= limits * (whole - delta).abs()
