"""PCB-Merging: parameters compete within their task and between tasks, and the best ones are averaged by score.

Source: Du et al., Parameter Competition Balancing for Model Merging, section 3, arXiv 2410.02396.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import check_scope, flat, scopes, share, wide
from lit_merge.functional.selection import order_statistics

__all__ = ("PcbFacts", "PcbFormula", "pcb_facts", "pcb_merge")

PcbFormula = Literal["paper", "released"]
_OUTLIERS = 1e-4  # share of magnitudes at each end that the released code clips


class _Products(NamedTuple):
    """Of the products τ_s ⊙ τ_t, over the network: ends, mean exp N, ``(T, T)`` each, and mean exp(T · N), ``(T,)``."""

    low: Tensor
    high: Tensor
    mass: Tensor
    own: Tensor


class _Limits(NamedTuple):
    """Magnitudes between which the released code clips, ``(T,)`` each."""

    low: Tensor
    high: Tensor


_Spread = _Products | _Limits


class PcbFacts(NamedTuple):
    """What the competition has to know of the whole network.

    Attributes:
        spread: What N and softmax are taken over.
        bounds: Lowest score that stays and highest score, per task, ``(2, T)``.
    """

    spread: _Products | _Limits
    bounds: Tensor


def pcb_merge(
    deltas: Mapping[str, Tensor],
    density: float = 0.1,
    *,
    per: Literal["network", "tensor"] = "network",
    formula: PcbFormula = "paper",
    facts: PcbFacts | None = None,
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
        facts: What :func:`pcb_facts` said, where ``deltas`` is a piece of a network and ``per`` is that.

    Returns:
        Merged task vector, ``(*shape)`` each; zero where no task keeps an entry.

    Raises:
        MergeError: ``density`` is outside (0, 1], or a name is unknown.

    >>> pcb_merge({"w": torch.tensor([[4.0, 1.0, 0.0], [2.0, -3.0, 0.0]])}, density=1 / 3)["w"]
    tensor([ 4., -3.,  0.])
    """
    check_scope(per, ("network", "tensor"))
    _check(density, formula)
    merged = {}
    for names in scopes(deltas, per) if deltas else ():
        part = {name: deltas[name] for name in names}
        found = _facts_of(part, density, formula) if facts is None or per == "tensor" else facts
        for name in names:
            scores = _scores({name: part[name]}, found.spread)[name]
            total, weight = torch.zeros_like(scores[0]), torch.zeros_like(scores[0])
            for task, (least, most) in enumerate(zip(*found.bounds, strict=True)):
                beta, value = scores[task], wide(part[name][task])
                if isinstance(found.spread, _Products):
                    beta = torch.where(beta >= least.to(beta), beta, 0)
                else:
                    beta = _unit(beta.clamp(min=least.to(beta)), least.to(beta), most.to(beta))
                    value = value.sign() * value.abs().clamp(*(end[task].to(value) for end in found.spread))
                total += beta * value
                weight += beta
            merged[name] = total / torch.where(weight > 0, weight, 1)
    return {name: merged[name] for name in deltas}


def pcb_facts(pieces: Iterable[Mapping[str, Tensor]], density: float = 0.1, formula: PcbFormula = "paper") -> PcbFacts:
    """Take from a network that is read piece by piece what :func:`pcb_merge` over the network needs of it.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time, in sorted order of names; read four
            times, in float64 six (``paper``) or eight times.
        density: See :func:`pcb_merge`.
        formula: See :func:`pcb_merge`.

    Raises:
        MergeError: ``density`` is outside (0, 1], or ``formula`` is unknown.

    >>> pcb_facts([{"w": torch.tensor([[4.0, 1.0, 0.0]])}, {"b": torch.tensor([[2.0]])}], 0.5).bounds.shape
    torch.Size([2, 1])
    """
    _check(density, formula)
    spread: _Spread
    if formula == "paper":
        spread = _products_of(pieces)
    else:
        spread = _Limits(*order_statistics(pieces, _clipped, magnitudes=True))
    return PcbFacts(spread, order_statistics(_Scores(pieces, spread), lambda size: _kept(size, density, formula)))


class _Scores:
    """Scores of pieces, each time they are read."""

    def __init__(self, pieces: Iterable[Mapping[str, Tensor]], spread: _Spread) -> None:
        self._pieces, self._spread = pieces, spread

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for piece in self._pieces:
            scores = _scores(piece, self._spread)
            del piece
            yield scores
            del scores


def _facts_of(part: Mapping[str, Tensor], density: float, formula: PcbFormula) -> PcbFacts:
    """The same of a network in memory, by sorting it task by task."""
    tasks, names = len(next(iter(part.values()))), sorted(part)
    spread: _Spread
    if formula == "paper":
        spread = _products_of([part])
    else:
        spread = _Limits(*_chosen([flat(part, names, task).abs() for task in range(tasks)], _clipped))
    scores = _scores(part, spread)
    rows = [flat(scores, names, task) for task in range(tasks)]
    return PcbFacts(spread, _chosen(rows, lambda size: _kept(size, density, formula)))


def _chosen(rows: Sequence[Tensor], ranks: Callable[[int], tuple[int, int]]) -> Tensor:
    """Entries of two ranks of every row, ``(2, T)``."""
    found = [
        torch.stack([row.kthvalue(rank).values for rank in ranks(len(row))]) if len(row) else row.new_zeros(2)
        for row in rows
    ]
    return torch.stack(found, dim=1)


def _check(density: float, formula: str) -> None:
    share("density", density)
    if formula not in get_args(PcbFormula):
        raise MergeError(f"formula: expected paper or released, found {formula!r}")


def _kept(size: int, density: float, formula: PcbFormula) -> tuple[int, int]:
    """Ranks of the lowest score that stays, and of the highest one."""
    if formula == "paper":
        return size - max(1, round(density * size)) + 1, size
    return min(int(size * (1 - density)), size - 1) + 1, size


def _clipped(size: int) -> tuple[int, int]:
    """Ranks of the magnitudes between which the released code clips."""
    return int(size * _OUTLIERS) + 1, max(int(size * (1 - _OUTLIERS) - 1), 0) + 1


def _unit(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Map [low, high] onto [0, 1]; all values alike become 0."""
    span = high - low
    return (values - low) / torch.where(span > 0, span, 1)


def _products_of(pieces: Iterable[Mapping[str, Tensor]]) -> _Products:
    """Ends of the products of two tasks, and mean exponentials of N of them, over the network: two readings."""
    low: Tensor | None = None
    size = 0
    for piece in pieces:
        if low is None and piece:
            tasks = len(next(iter(piece.values())))
            low = wide(next(iter(piece.values()))[:0]).new_full((tasks, tasks), torch.inf)
            high = -low
        for one, other, product in _pairs(piece):
            assert low is not None
            low[one, other] = torch.minimum(low[one, other], product.min().to(low.device))
            high[one, other] = torch.maximum(high[one, other], product.max().to(low.device))
        size += sum(delta[0].numel() for delta in piece.values())
        del piece
    if low is None:
        raise MergeError("pcb: expected task vectors, found none")
    mass, own = torch.zeros_like(low), low.new_zeros(tasks)
    for piece in pieces:
        for one, other, product in _pairs(piece):
            unit = _unit(product, low[one, other].to(product.device), high[one, other].to(product.device))
            mass[one, other] += unit.exp().mean().to(mass) * (product.numel() / size)
            if one == other:
                own[one] += (tasks * unit).exp().mean().to(own) * (product.numel() / size)
        del piece
    return _Products(low, high, mass, own)


def _scores(deltas: Mapping[str, Tensor], spread: _Spread) -> dict[str, Tensor]:
    return _paper(deltas, spread) if isinstance(spread, _Products) else _released(deltas, spread)


def _paper(deltas: Mapping[str, Tensor], spread: _Products) -> dict[str, Tensor]:
    """Scores of the paper's equations 1 to 3, ``(T, *shape)`` each."""
    low, high, mass, own = spread
    scores = {}
    for name, delta in deltas.items():
        intra, inter = torch.zeros_like(wide(delta)), torch.zeros_like(wide(delta))
        for one, other, product in _pairs({name: delta}):
            unit = _unit(product, low[one, other].to(product.device), high[one, other].to(product.device))
            closeness = unit.exp() / mass[one, other].to(product.device)  # softmax times d: the factor cancels
            inter[one] += closeness
            if one == other:
                intra[one] = (len(delta) * unit).exp() / own[one].to(product.device)
            else:
                inter[other] += closeness
        scores[name] = intra.mul_(inter)
    return scores


def _pairs(deltas: Mapping[str, Tensor]) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (s, t, τ_s ⊙ τ_t) for s <= t, tensor by tensor; empty tensors have none."""
    for delta in deltas.values():
        for one in range(len(delta) if delta[0].numel() else 0):
            for other in range(one, len(delta)):
                yield one, other, wide(delta[one]) * wide(delta[other])


def _released(deltas: Mapping[str, Tensor], spread: _Limits) -> dict[str, Tensor]:
    """Scores of the released code, ``(T, *shape)`` each."""
    scores = {}
    for name, delta in deltas.items():
        whole = wide(delta).sum(0)
        rows = []
        for task, row in enumerate(delta):
            value = wide(row)
            least, most = spread.low[task].to(value), spread.high[task].to(value)
            within = (len(delta) * _unit(value.abs().clamp(least, most), least, most).square()).exp()
            rows.append(within * torch.tanh(value * whole))
        scores[name] = torch.stack(rows)
    return scores
