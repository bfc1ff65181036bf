"""PCB-Merging: parameters compete within their task and between tasks, and the best ones are averaged by score.

Source: Du et al., Parameter Competition Balancing for Model Merging, section 3, arXiv 2410.02396.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import check_scope, flat, scopes, share, wide

__all__ = ("PcbFormula", "pcb_merge")

PcbFormula = Literal["paper", "released"]
_OUTLIERS = 1e-4  # share of magnitudes at each end that the released code clips


def pcb_merge(
    deltas: Mapping[str, Tensor],
    density: float = 0.1,
    *,
    per: Literal["network", "tensor"] = "network",
    formula: PcbFormula = "paper",
) -> dict[str, Tensor]:
    """Average every entry over the tasks by its score in the competition: Σ_t β_t τ_t / Σ_t β_t.

    Of every task only the share ``density`` of entries with the highest scores keep them; the others have β = 0. With
    T tasks, d entries and N(·) the map of the d values onto [0, 1]:

    ============  ===========================================================  ==================================
    ``formula``   score                                                        β
    ============  ===========================================================  ==================================
    ``paper``     softmax(T · N(τ_t²)) · Σ_s softmax(N(τ_t τ_s))               the score
    ``released``  exp(T · N(abs τ_t)²) · tanh(τ_t Σ_s τ_s)                     N of the score from the least kept
    ============  ===========================================================  ==================================

    In the released code magnitudes are also clipped at their quantiles 10⁻⁴ and 1 − 10⁻⁴, in scores and in the average.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share r of entries that stay, in (0, 1]. The paper tunes it on validation data; 0.1 is the default of
            the released code.
        per: N, softmax and ranks are over the ``network``, as published, or over each ``tensor``.
        formula: Which of these.

    Returns:
        Merged task vector, ``(*shape)`` each; zero where no task keeps an entry.

    Raises:
        MergeError: ``density`` is outside (0, 1], or a name is unknown.

    >>> pcb_merge({"w": torch.tensor([[4.0, 1.0, 0.0], [2.0, -3.0, 0.0]])}, density=1 / 3)["w"]
    tensor([ 4., -3.,  0.])
    """
    check_scope(per, ("network", "tensor"))
    share("density", density)
    if formula not in get_args(PcbFormula):
        raise MergeError(f"formula: expected paper or released, found {formula!r}")
    merged = {}
    for names in scopes(deltas, per):
        part = {name: deltas[name] for name in names}
        limits = _limits(part) if formula == "released" else None
        scores = _paper(part) if limits is None else _released(part, *limits)
        tasks = len(next(iter(part.values()))) if part else 0
        bounds = [_kept(flat(scores, names, task), density, formula) for task in range(tasks)]
        for name in names:
            total, weight = torch.zeros_like(scores[name][0]), torch.zeros_like(scores[name][0])
            for task, (least, most) in enumerate(bounds):
                beta, value = scores[name][task], wide(part[name][task])
                if limits is None:
                    beta = torch.where(beta >= least.to(beta), beta, 0)
                else:
                    beta = _unit(beta.clamp(min=least.to(beta)), least.to(beta), most.to(beta))
                    value = value.sign() * value.abs().clamp(*(end[task].to(value) for end in limits))
                total += beta * value
                weight += beta
            merged[name] = total / torch.where(weight > 0, weight, 1)
    return {name: merged[name] for name in deltas}


def _kept(scores: Tensor, density: float, formula: PcbFormula) -> tuple[Tensor, Tensor]:
    """Lowest score that stays, and the highest one, of ``(P,)``."""
    size = scores.numel()
    if size == 0:
        return scores.new_zeros(()), scores.new_zeros(())
    if formula == "paper":
        rank = size - max(1, round(density * size)) + 1
    else:
        rank = min(int(size * (1 - density)), size - 1) + 1
    return scores.kthvalue(rank).values, scores.max()


def _unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map [low, high] onto [0, 1]; all values alike become 0."""
    span = high - low
    return (values - low) / torch.where(span > 0, span, 1)


def _paper(deltas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Scores of the paper's equations 1 to 3, ``(T, *shape)`` each: three passes over the pairs of tasks."""
    tasks = len(next(iter(deltas.values())))
    some = wide(next(iter(deltas.values()))[:0])
    low = some.new_full((tasks, tasks), torch.inf)
    high, mass = -low, some.new_zeros(tasks, tasks)
    own = some.new_zeros(tasks)
    size = sum(delta[0].numel() for delta in deltas.values())
    for one, other, product in _products(deltas):
        low[one, other] = torch.minimum(low[one, other], product.min().to(low.device))
        high[one, other] = torch.maximum(high[one, other], product.max().to(low.device))
    for one, other, product in _products(deltas):
        unit = _unit(product, low[one, other].to(product.device), high[one, other].to(product.device))
        mass[one, other] += unit.exp().mean().to(mass) * (product.numel() / size)
        if one == other:
            own[one] += (tasks * unit).exp().mean().to(own) * (product.numel() / size)
    scores = {}
    for name, delta in deltas.items():
        intra, inter = torch.zeros_like(wide(delta)), torch.zeros_like(wide(delta))
        for one, other, product in _products({name: delta}):
            unit = _unit(product, low[one, other].to(product.device), high[one, other].to(product.device))
            closeness = unit.exp() / mass[one, other].to(product.device)  # softmax times d: the factor cancels
            inter[one] += closeness
            if one == other:
                intra[one] = (tasks * unit).exp() / own[one].to(product.device)
            else:
                inter[other] += closeness
        scores[name] = intra.mul_(inter)
    return scores


def _products(deltas: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (s, t, τ_s ⊙ τ_t) for s <= t, tensor by tensor; empty tensors have none."""
    for delta in deltas.values():
        for one in range(len(delta) if delta[0].numel() else 0):
            for other in range(one, len(delta)):
                yield one, other, wide(delta[one]) * wide(delta[other])


def _limits(deltas: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Magnitudes between which the released code clips, ``(T,)`` each."""
    ends = []
    for task in range(len(next(iter(deltas.values())))):
        magnitudes = flat(deltas, sorted(deltas), task).abs()
        size = max(magnitudes.numel(), 1)
        ranks = int(size * _OUTLIERS) + 1, max(int(size * (1 - _OUTLIERS) - 1), 0) + 1
        nothing = magnitudes.new_zeros(())
        ends.append([magnitudes.kthvalue(rank).values if magnitudes.numel() else nothing for rank in ranks])
    return torch.stack([low for low, _ in ends]), torch.stack([high for _, high in ends])


def _released(deltas: Mapping[str, Tensor], low: Tensor, high: Tensor) -> dict[str, Tensor]:
    """Scores of the released code, ``(T, *shape)`` each."""
    scores = {}
    for name, delta in deltas.items():
        whole = wide(delta).sum(0)
        rows = []
        for task, row in enumerate(delta):
            value = wide(row)
            least, most = low[task].to(value), high[task].to(value)
            within = (len(delta) * _unit(value.abs().clamp(least, most), least, most).square()).exp()
            rows.append(within * torch.tanh(value * whole))
        scores[name] = torch.stack(rows)
    return scores
