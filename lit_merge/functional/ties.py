"""TIES: trim, elect signs, merge what agrees.

Source: Yadav et al., TIES-Merging, section 4 and algorithm 1, arXiv 2306.01708.
All tensors of a task form one vector: trimming is global, so a tensor that changed little may vanish. ``per="tensor"``
takes every tensor for itself, as mergekit does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.functional.scopes import check_scope, wide
from lit_merge.functional.selection import kth_magnitude, kth_magnitudes
from lit_merge.functional.side_by_side import side_by_side

__all__ = (
    "TiesFacts",
    "TiesScope",
    "disjoint_mean_merge",
    "elect_signs",
    "majority_sign",
    "ties",
    "ties_facts",
    "ties_merge",
    "trim",
)


Reduce = Literal["mean", "sum"]
TiesScope = Literal["network", "tensor"]

_ENTRIES = 2**16  # that are merged at once: a cache holds them for eight tasks


class TiesFacts(NamedTuple):
    """What trimming and election have to know of the whole network.

    Attributes:
        thresholds: Magnitude of the last entry that stays, per task, ``(T,)``.
        majority: Sign, +1 or -1, of most entries of the network.
    """

    thresholds: Tensor
    majority: float


def ties_facts(pieces: Iterable[Mapping[str, Tensor]], density: float = 0.2) -> TiesFacts:
    """Take from a network that is read piece by piece what :func:`ties` needs to go through it piece by piece.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time. They are read three times, four times in
            float64: the thresholds are exact, whatever the size of the network.
        density: Share of entries that stay, in (0, 1].

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> import torch
    >>> ties_facts([{"w": torch.tensor([[1.0, -4.0]])}, {"b": torch.tensor([[-2.0, -0.5]])}], density=0.5)
    TiesFacts(thresholds=tensor([2.]), majority=-1.0)
    """
    _check(density)
    thresholds = kth_magnitudes(pieces, lambda size: size - max(1, round(density * size)) + 1)

    def trimmed() -> Iterator[dict[str, Tensor]]:
        for piece in pieces:
            kept = trim(piece, density, thresholds=thresholds)
            del piece
            yield kept
            del kept

    return TiesFacts(thresholds, majority_sign(trimmed()))


def majority_sign(pieces: Iterable[Mapping[str, Tensor]]) -> float:
    """Return the sign, +1 or -1, that the sum over tasks has in most entries of a network; +1 if it is balanced.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time.
    """
    balance = 0.0
    for piece in pieces:
        balance += sum(float(_sum(delta).sign().sum()) for delta in piece.values())
        del piece
    return -1.0 if balance < 0 else 1.0


def trim(deltas: Mapping[str, Tensor], density: float = 0.2, *, thresholds: Tensor | None = None) -> dict[str, Tensor]:
    """Keep the entries of largest magnitude of every task, over all its tensors together, and zero the rest.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share of entries that stay, in (0, 1]; ``round(density * d)`` of d, and whatever ties with the last.
        thresholds: Smallest magnitude that stays, per task, ``(T,)``, where ``deltas`` is a piece of the network.

    Returns:
        Trimmed task vectors, ``(T, *shape)`` each.

    Raises:
        MergeError: ``density`` is outside (0, 1].

    >>> import torch
    >>> trim({"w": torch.tensor([[1.0, -4.0, 2.0, 0.5]])}, density=0.5)
    {'w': tensor([[ 0., -4.,  2.,  0.]])}
    """
    _check(density)
    limits = _thresholds(deltas, density) if thresholds is None else thresholds
    trimmed = {}
    for name, delta in deltas.items():
        kept = torch.zeros_like(delta, memory_format=torch.contiguous_format)
        for row, limit, out in zip(delta, limits.to(delta), kept, strict=True):  # copies are of one task at a time
            out.copy_(row).masked_fill_(row.abs() < limit, 0)
        trimmed[name] = kept
    return trimmed


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise MergeError(f"density: expected a share in (0, 1], found {density}")


def _thresholds(deltas: Mapping[str, Tensor], density: float) -> Tensor:
    """Magnitude of the last entry that stays, per task: ``(T,)``."""
    tasks = len(next(iter(deltas.values()))) if deltas else 0

    def threshold(task: int) -> Tensor:
        parts = [delta[task] for delta in deltas.values()]
        size = sum(part.numel() for part in parts)
        return kth_magnitude(parts, size - max(1, round(density * size)) + 1)

    return torch.stack(side_by_side(threshold, range(tasks), _device(deltas))) if tasks else torch.empty(0)


def elect_signs(deltas: Mapping[str, Tensor], *, majority: float | None = None) -> dict[str, Tensor]:
    """Elect one sign per entry: that of the sum over tasks.

    Entries whose sum is exactly zero take the majority sign of all entries of the network (positive if that is
    balanced too), as in the released code; the paper leaves the case open.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        majority: What :func:`majority_sign` said, where ``deltas`` is a piece of the network.

    Returns:
        Signs, +1 or -1, ``(*shape)`` each.

    >>> import torch
    >>> elect_signs({"w": torch.tensor([[1.0, -4.0, 2.0], [2.0, 1.0, -2.0]])})
    {'w': tensor([ 1., -1.,  1.])}
    """
    signs = {name: _sum(delta).sign() for name, delta in deltas.items()}
    if majority is None:
        majority = -1.0 if sum(float(sign.sum()) for sign in signs.values()) < 0 else 1.0
    return {name: sign.masked_fill_(sign == 0, majority) for name, sign in signs.items()}


def ties(
    deltas: Mapping[str, Tensor],
    density: float = 0.2,
    *,
    per: TiesScope = "network",
    facts: TiesFacts | None = None,
) -> dict[str, Tensor]:
    """Trim each task vector and zero the entries whose sign lost the election.

    The result is still one vector per task: its sum is the TIES merge with disjoint sum, and
    :func:`disjoint_mean_merge` of it the published one with disjoint mean.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share of entries that stay in trimming, in (0, 1]; 0.2 is the published value.
        per: Trimming and majority are those of the ``network``, as published, or of each ``tensor``, as in mergekit.
        facts: What :func:`ties_facts` said, where ``deltas`` is a piece of the network and ``per`` is that.

    Returns:
        Task vectors, ``(T, *shape)`` each, whose entries agree in sign across tasks.

    Raises:
        MergeError: ``density`` is outside (0, 1], or ``per`` is unknown.

    >>> import torch
    >>> ties({"w": torch.tensor([[5.0, -4.0, 0.1, 0.2], [3.0, 6.0, 0.2, 0.1]])}, density=0.5)
    {'w': tensor([[5., 0., 0., 0.],
            [3., 6., 0., 0.]])}
    """
    check_scope(per, get_args(TiesScope))
    if per == "tensor":
        return {name: ties({name: delta}, density)[name] for name, delta in deltas.items()}
    kept = trim(deltas, density, thresholds=None if facts is None else facts.thresholds)
    signs = elect_signs(kept, majority=None if facts is None else facts.majority)
    for name, delta in kept.items():
        for row in delta:  # in place, as it is a copy already
            row.masked_fill_(row.sign() != signs[name], 0)
    return kept


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
    merged = {}
    for name, delta in deltas.items():
        total = delta.sum(0, dtype=wide(delta[:0]).dtype)
        number = torch.zeros_like(total)
        for row in delta:
            number += row != 0
        merged[name] = total.div_(number.clamp_(min=1))
    return merged


def ties_merge(
    deltas: Mapping[str, Tensor],
    density: float = 0.2,
    reduce: Reduce = "mean",
    *,
    per: TiesScope = "network",
    facts: TiesFacts | None = None,
) -> dict[str, Tensor]:
    """Merge by TIES: what :func:`ties` and :func:`disjoint_mean_merge` do one after the other, in one go.

    Beside the result nothing of its size is made; the time is that of two readings of the task vectors.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        density: Share of entries that stay in trimming, in (0, 1].
        reduce: ``mean`` over the tasks that kept an entry, or ``sum``.
        per: See :func:`ties`.
        facts: What :func:`ties_facts` said, where ``deltas`` is a piece of the network and ``per`` is that.

    Returns:
        Merged task vector, ``(*shape)`` each, at least float32; zero where every task is zero.

    Raises:
        MergeError: ``density`` is outside (0, 1], or ``reduce`` or ``per`` is unknown.

    >>> import torch
    >>> ties_merge({"w": torch.tensor([[5.0, -4.0, 0.1, 0.2], [3.0, 6.0, 0.2, 0.1]])}, density=0.5)
    {'w': tensor([4., 6., 0., 0.])}
    """
    _check(density)
    if reduce not in get_args(Reduce):
        raise MergeError(f"reduce: expected mean or sum, found {reduce!r}")
    check_scope(per, get_args(TiesScope))
    if per == "tensor":
        return {name: ties_merge({name: delta}, density, reduce)[name] for name, delta in deltas.items()}
    limits = _thresholds(deltas, density) if facts is None else facts.thresholds
    merged, pieces, device = {}, list[tuple[Tensor, Tensor]](), _device(deltas)
    entries = _ENTRIES if device.type == "cpu" else 64 * _ENTRIES
    for name, delta in deltas.items():
        result = delta.new_empty(delta.shape[1:], dtype=wide(delta[:0]).dtype)
        merged[name] = result
        columns = delta.reshape(len(delta), -1).split(entries, dim=1)
        pieces += zip(columns, result.view(-1).split(entries), strict=True)

    def merge(piece: tuple[Tensor, Tensor]) -> tuple[float, Tensor | None]:
        values, out = piece
        kept = _trimmed(values, limits, out.dtype)
        signs = _sum(kept).sign_()
        balance = float(signs.sum())
        cancelled = (signs == 0).logical_and_(kept.amax(0) > 0)
        out.copy_(_agreeing(kept, signs, reduce))
        return balance, cancelled if bool(cancelled.any()) else None

    said = side_by_side(merge, pieces, device)
    majority = (-1.0 if sum(balance for balance, _ in said) < 0 else 1.0) if facts is None else facts.majority
    for (values, out), (_, cancelled) in zip(pieces, said, strict=True):
        if cancelled is not None:  # the vote of the network is known only now
            kept = _trimmed(values[:, cancelled], limits, out.dtype)
            out[cancelled] = _agreeing(kept, kept.new_full(kept.shape[1:], majority), reduce)
    return merged


def _device(deltas: Mapping[str, Tensor]) -> torch.device:
    return next((delta.device for delta in deltas.values()), torch.device("cpu"))


def _sum(delta: Tensor) -> Tensor:
    return delta.sum(0, dtype=wide(delta[:0]).dtype)


def _trimmed(values: Tensor, limits: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of entries ``(T, c)`` without those below the limits ``(T,)``."""
    return values.to(dtype).mul(values.abs() >= limits.to(values)[:, None])


def _agreeing(kept: Tensor, signs: Tensor, reduce: Reduce) -> Tensor:
    """Sum or mean ``(c,)`` of the entries ``(T, c)``, which are overwritten, that have the sign ``(c,)``."""
    lengths = kept.mul_(signs).clamp_(min=0)
    total = lengths.sum(0).mul_(signs)
    return total if reduce == "sum" else total.div_(lengths.sign_().sum(0).clamp_(min=1))
