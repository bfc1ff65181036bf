"""SCE: select entries by variance, calculate a coefficient per tensor, erase the minority's signs.

Source: Wan et al., FuseChat: Knowledge Fusion of Chat Models, section 3.3 and algorithm 1, arXiv 2408.07990.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lit_merge.functional.scopes import check_scope, scopes, share, wide
from lit_merge.functional.selection import kth_magnitudes

__all__ = ("SceFacts", "sce_facts", "sce_merge")


class SceFacts(NamedTuple):
    """What selection and coefficients have to know of the whole network.

    Attributes:
        least: Smallest variance that is selected, a scalar.
        energies: Sum of squares of what is selected, per task, ``(T,)``.
    """

    least: Tensor
    energies: Tensor


def sce_merge(
    deltas: Mapping[str, Tensor],
    density: float = 0.1,
    *,
    per: Literal["tensor", "network"] = "tensor",
    renormalize: bool = False,
    facts: SceFacts | None = None,
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
        facts: What :func:`sce_facts` said, where ``deltas`` is a piece of a network and ``per`` is that.

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
        if facts is None or per != "network":
            variances = torch.cat([_variance(deltas[name]).reshape(-1) for name in names])
            least = _largest(variances, density)
            found = SceFacts(least, _energies([{name: deltas[name] for name in names}], least))
            del variances  # as large as the network
        else:
            found = facts
        total = found.energies.sum()
        eta = torch.where(total > 0, found.energies / total, 1 / len(found.energies))
        for name in names:
            delta = _selected(deltas[name], found.least)
            weights = eta.to(delta).reshape(-1, *[1] * (delta.ndim - 1))
            agrees = torch.where(delta.sum(0) < 0, delta < 0, delta > 0)
            value = torch.where(agrees, weights * delta, 0).sum(0)
            if renormalize:
                divisor = (weights * agrees).sum(0)
                value = value / torch.where(divisor > 0, divisor, 1)
            merged[name] = value
    return {name: merged[name] for name in deltas}


def sce_facts(pieces: Iterable[Mapping[str, Tensor]], density: float = 0.1) -> SceFacts:
    """Take from a network that is read piece by piece what :func:`sce_merge` over the network needs of it.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time, in sorted order of names; read three
            times, five times in float64.
        density: Share of entries that are selected, in (0, 1].

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> halves = [{"a": torch.tensor([[3.0, 1.0], [1.0, 1.0]])}, {"b": torch.tensor([[1.0, 0.0], [-2.0, 0.0]])}]
    >>> sce_facts(halves, density=0.5)
    SceFacts(least=tensor(1.), energies=tensor([10.,  5.]))
    """
    share("density", density)
    least = kth_magnitudes(_Variances(pieces), lambda size: _rank(size, density))
    return SceFacts(least[0] if len(least) else torch.zeros(()), _energies(pieces, least[0] if len(least) else least))


class _Variances:
    """Variances ``(1, *shape)`` of pieces, each time they are read."""

    def __init__(self, pieces: Iterable[Mapping[str, Tensor]]) -> None:
        self._pieces = pieces

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        for piece in self._pieces:
            variances = {name: _variance(delta)[None] for name, delta in piece.items()}
            del piece
            yield variances
            del variances


def _energies(pieces: Iterable[Mapping[str, Tensor]], least: Tensor) -> Tensor:
    """Sums of squares of what is selected, ``(T,)``, tensor by tensor."""
    energy: Tensor | None = None
    for piece in pieces:
        for delta in piece.values():
            squares = _selected(delta, least).square().reshape(len(delta), -1).sum(1)
            energy = squares if energy is None else energy + squares.to(energy.device)
            del delta
        del piece
    return torch.zeros(0) if energy is None else energy


def _variance(delta: Tensor) -> Tensor:
    """Variance over the tasks; around the first of them, so that it is exactly 0 where all are alike."""
    values = wide(delta)
    values = values - values[0]
    return (values.square().mean(0) - values.mean(0).square()).clamp(min=0)


def _rank(size: int, density: float) -> int:
    return size - max(1, round(density * size)) + 1


def _largest(values: Tensor, density: float) -> Tensor:
    """The smallest of the largest values, ``(P,)``, that are selected."""
    return values.kthvalue(_rank(len(values), density)).values if len(values) else values.new_zeros(())


def _selected(delta: Tensor, least: Tensor) -> Tensor:
    return torch.where(_variance(delta) >= least.to(delta.device), wide(delta), 0)
