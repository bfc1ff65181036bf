"""EMR merging: one unified vector, and per task a mask and a rescaler that turn it back into something like the expert.

The unified vector alone is one network. With masks and rescalers there are T networks, of which one has to be chosen by
knowing the task; they cost one bit per entry and task to store, not to run.

Source: Huang et al., EMR-Merging: Tuning-Free High-Performance Model Merging, section 3, arXiv 2405.17461.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import wide

__all__ = ("EmrBalance", "emr", "emr_rescalers", "emr_unified")

EmrBalance = Literal["entries", "tensors"]


def emr_unified(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Elect: of each entry the sign of the sum over tasks, and the largest magnitude among the tasks that have it.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.

    Returns:
        Unified task vector, ``(*shape)`` each. A sum of exactly zero counts as negative, as in the released code.

    >>> emr_unified({"w": torch.tensor([[1.0, -4.0, 2.0], [2.0, 3.0, -2.0]])})
    {'w': tensor([ 2., -4., -2.])}
    """
    unified = {}
    for name, delta in deltas.items():
        values = wide(delta)
        unified[name] = torch.where(values.sum(0) > 0, values.amax(0).clamp(min=0), values.amin(0).clamp(max=0))
    return unified


def emr_rescalers(
    deltas: Mapping[str, Tensor], unified: Mapping[str, Tensor], balance: EmrBalance = "entries"
) -> Tensor:
    """Rescale: the factor that gives the masked unified vector the mean magnitude of the task's own.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        unified: What :func:`emr_unified` returned.
        balance: ``entries``: sums over all entries of the network, as in the paper; ``tensors``: sums of the means of
            the tensors, so that a bias counts as much as a matrix, as in the released code and FusionBench.

    Returns:
        Factors, ``(T,)``; 0 for a task of which nothing is in the unified vector.

    Raises:
        MergeError: ``balance`` is unknown.

    >>> deltas = {"w": torch.tensor([[1.0, -4.0, 2.0], [2.0, 3.0, -2.0]])}
    >>> emr_rescalers(deltas, emr_unified(deltas))  # 7 / (2 + 4) and 7 / (2 + 2)
    tensor([1.1667, 1.7500])
    """
    if balance not in get_args(EmrBalance):
        raise MergeError(f"balance: expected entries or tensors, found {balance!r}")
    own: list[Tensor] = []
    kept: list[Tensor] = []
    for name in sorted(deltas):
        delta = deltas[name]
        if delta[0].numel() == 0:
            continue
        share = 1 / delta[0].numel() if balance == "tensors" else 1.0
        rows = wide(delta).reshape(len(delta), -1)
        masked = torch.where(rows * unified[name].reshape(-1) > 0, unified[name].reshape(-1), 0)
        own.append(rows.abs().sum(1).cpu().double() * share)
        kept.append(masked.abs().sum(1).cpu().double() * share)
    if not own:
        return torch.ones(len(next(iter(deltas.values()))) if deltas else 0)
    whole, part = torch.stack(own).sum(0), torch.stack(kept).sum(0)
    return torch.where(part > 0, whole / torch.where(part > 0, part, 1), 0).to(wide(delta[:0]).dtype)


def emr(deltas: Mapping[str, Tensor], balance: EmrBalance = "entries") -> dict[str, Tensor]:
    """Reconstruct the tasks from the unified vector: rescaler_t · [τ_t τ_uni > 0] ⊙ τ_uni.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        balance: See :func:`emr_rescalers`.

    Returns:
        Task vectors, ``(T, *shape)`` each: T networks, for T tasks.

    Raises:
        MergeError: ``balance`` is unknown.

    >>> emr({"w": torch.tensor([[1.0, -4.0, 2.0], [2.0, 3.0, -2.0]])})["w"]
    tensor([[ 2.3333, -4.6667,  0.0000],
            [ 3.5000,  0.0000, -3.5000]])
    """
    unified = emr_unified(deltas)
    factors = emr_rescalers(deltas, unified, balance)
    rebuilt = {}
    for name, delta in deltas.items():
        whole = unified[name]
        scaled = factors.to(whole).reshape(-1, *[1] * whole.ndim) * whole
        rebuilt[name] = torch.where(delta * whole > 0, scaled, 0)
    return rebuilt
