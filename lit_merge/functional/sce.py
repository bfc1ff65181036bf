"""SCE: select entries by variance, calculate a coefficient per tensor, erase the minority's signs.

Source: Wan et al., FuseChat: Knowledge Fusion of Chat Models, section 3.3 and algorithm 1, arXiv 2408.07990.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from lit_merge.functional.scopes import check_scope, scopes, share, wide

__all__ = ("sce_merge",)


def sce_merge(
    deltas: Mapping[str, Tensor],
    density: float = 0.1,
    *,
    per: Literal["tensor", "network"] = "tensor",
    renormalize: bool = False,
) -> dict[str, Tensor]:
    """Merge where the experts differ most, by energy, and without the minority.

    1. Select: keep the entries whose variance over the tasks is among the largest.
    2. Calculate: η_t = Σ δ_t² / Σ_s Σ δ_s² over what is left of a tensor.
    3. Erase: zero the entries whose sign is not that of the sum over tasks (positive if it is zero).

    The result is Σ_t η_t δ_t.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share of entries that are selected, in (0, 1], and whatever ties with the last: experts that are all
            alike are merged entirely. mergekit's ``select_topk``, which is 1 by default.
        per: Selection and coefficients are those of each ``tensor``, as published, or of the whole ``network``.
        renormalize: Divide each entry by the sum of coefficients of the tasks that were not erased, as mergekit does.

    Returns:
        Merged task vector, ``(*shape)`` each.

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> sce_merge({"w": torch.tensor([[3.0, 1.0, 1.0, 0.0], [1.0, 1.0, -2.0, 0.0]])}, density=0.5)  # η = 10/15, 5/15
    {'w': tensor([ 2.3333,  0.0000, -0.6667,  0.0000])}
    """
    check_scope(per, ("tensor", "network"))
    share("density", density)
    merged = {}
    for names in scopes(deltas, per) if deltas else ():
        variances = {name: _variance(deltas[name]) for name in names}
        least = _largest(torch.cat([value.reshape(-1) for value in variances.values()]), density)
        energy: Tensor | None = None
        for name in names:
            squares = _selected(deltas[name], variances[name], least).square().reshape(len(deltas[name]), -1).sum(1)
            energy = squares if energy is None else energy + squares.to(energy.device)
        if energy is None:
            continue
        total = energy.sum()
        eta = torch.where(total > 0, energy / total, 1 / len(energy))
        for name in names:
            delta = _selected(deltas[name], variances[name], least)
            weights = eta.to(delta).reshape(-1, *[1] * (delta.ndim - 1))
            agrees = torch.where(delta.sum(0) < 0, delta < 0, delta > 0)
            value = torch.where(agrees, weights * delta, 0).sum(0)
            if renormalize:
                divisor = (weights * agrees).sum(0)
                value = value / torch.where(divisor > 0, divisor, 1)
            merged[name] = value
    return {name: merged[name] for name in deltas}


def _variance(delta: Tensor) -> Tensor:
    """Variance over the tasks; around the first of them, so that it is exactly 0 where all are alike."""
    values = wide(delta)
    values = values - values[0]
    return (values.square().mean(0) - values.mean(0).square()).clamp(min=0)


def _largest(values: Tensor, density: float) -> Tensor:
    """The smallest of the largest values, ``(P,)``, that are selected."""
    if values.numel() == 0:
        return values.new_zeros(())
    return values.kthvalue(values.numel() - max(1, round(density * values.numel())) + 1).values


def _selected(delta: Tensor, variance: Tensor, least: Tensor) -> Tensor:
    return torch.where(variance >= least.to(delta.device), wide(delta), 0)
