"""DELLA: drop entries at random, small ones rather than large ones, rescale, elect signs, average.

Source: Deep, Bhardwaj and Poria, DELLA-Merging: Reducing Interference in Model Merging through Magnitude-Based
Sampling, section 3, arXiv 2406.11617.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_merge.functional.dare import check_drop
from lit_merge.functional.scopes import as_rows, check_scope, wide
from lit_merge.functional.ties import disjoint_mean_merge, elect_signs

__all__ = ("elected_mean_merge", "magprune")


def magprune(
    deltas: Mapping[str, Tensor],
    drop: float = 0.5,
    window: float = 0.3,
    generator: torch.Generator | None = None,
    *,
    per: Literal["row", "tensor"] = "row",
    rescale: bool = True,
) -> dict[str, Tensor]:
    """Zero each entry with a probability that falls with its rank by magnitude, and divide the rest by what is left.

    The entry of rank r, from 0 for the smallest of n, is dropped with p = drop + window · (½ − (r + ½)/n). The mean
    is ``drop`` exactly, also for a single entry; the paper's ranks start at the edge instead, which is less by
    window/2n. Every survivor is divided by its own 1 − p, so the expectation does not change.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        drop: Mean probability p of dropping an entry.
        window: Width ε of the probabilities around it; mergekit's ``epsilon`` is half of it. 0 is DARE.
        generator: Source of randomness, on the CPU; by default a new one with seed 0.
        per: Ranks are taken in each ``row`` (output neuron) as in the paper, or in each ``tensor``.
        rescale: Divide what stays by 1 − p.

    Returns:
        Task vectors, ``(T, *shape)`` each. The mask depends on generator and sorted names only.

    Raises:
        MergeError: The probabilities do not lie in [0, 1).

    >>> sparse = magprune({"w": torch.tensor([[0.1, 0.2, 0.3, 0.4]])}, 0.5, 0.8)
    >>> sparse["w"]  # probabilities 0.8, 0.6, 0.4, 0.2
    tensor([[0.0000, 0.5000, 0.0000, 0.0000]])
    """
    check_scope(per, ("row", "tensor"))
    check_drop(drop, window)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    sparse = {}
    for name in sorted(deltas):
        delta = deltas[name]
        rows = as_rows(delta, per)
        noise = torch.rand(rows.shape, generator=generator)
        size = max(rows.shape[-1], 1)
        ladder = drop + window * (0.5 - (torch.arange(rows.shape[-1], device=rows.device) + 0.5) / size)
        kept = torch.empty_like(rows)
        for task, row in enumerate(rows):  # ranks are int64: those of one task at a time
            p = torch.empty_like(wide(row))
            p.scatter_(-1, row.abs().argsort(dim=-1, stable=True), ladder.to(p).expand_as(p))
            kept[task] = torch.where(noise[task].to(p) >= p, row / (1 - p) if rescale else row, 0)
        sparse[name] = kept.reshape(delta.shape)
    return {name: sparse[name] for name in deltas}


def elected_mean_merge(deltas: Mapping[str, Tensor], *, majority: float | None = None) -> dict[str, Tensor]:
    """Elect one sign per entry, and average the tasks that have it.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each, such as :func:`magprune` returns.
        majority: What :func:`~lit_merge.functional.ties.majority_sign` said, for a piece of the network.

    Returns:
        Merged task vector, ``(*shape)`` each.

    >>> elected_mean_merge({"w": torch.tensor([[4.0, 0.0], [2.0, -1.0], [-3.0, 0.5]])})
    {'w': tensor([ 3., -1.])}
    """
    signs = elect_signs(deltas, majority=majority)
    merged: dict[str, Tensor] = {}
    for name, delta in deltas.items():  # tensor by tensor: a sparse copy of one, not of the bank
        agreeing = {name: torch.where(delta.sign() == signs[name], delta, 0)}
        merged |= disjoint_mean_merge(agreeing)
    return merged
