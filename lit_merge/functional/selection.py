"""Exact order statistics of long vectors: by a sample in memory, by the bits of the entries where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.functional.scopes import wide

__all__ = ("kth_magnitude", "kth_magnitudes", "order_statistics")

_DIGIT = 16  # bits that are decided on in one reading: a table of 65536 counts per task
_SIZE = 2**_DIGIT
_PIECE = 2**22  # entries that are counted at once
_NEAR = 2**18  # entries that are compared at once, which a cache holds
_SAMPLE = 2**16
_MARGIN = 5.0  # standard deviations of a rank in the sample


def kth_magnitude(parts: Sequence[Tensor], rank: int) -> Tensor:
    """Return the magnitude of a given rank, as sorting all entries would.

    A sample brackets it. One reading counts what is below the bracket and collects what is within, some percent of the
    entries, among which the answer is selected; in the rare case that it is not there, all of them are.

    Args:
        parts: The vector in pieces of any shape and one type; the entries are finite.
        rank: From 1 for the smallest to the number of entries.

    Returns:
        A scalar of the type of the entries.

    >>> kth_magnitude([torch.tensor([5.0, -3.0]), torch.tensor([[-4.0]])], 2)
    tensor(4.)
    """
    flat = [part.reshape(-1) for part in parts if part.numel()]
    size = sum(len(part) for part in flat)
    if size > 4 * _SAMPLE:
        step = size // _SAMPLE
        sample = torch.cat([part[::step] for part in flat]).abs().sort().values  # of every part, however short it is
        place, spread = rank / size * len(sample), _MARGIN * len(sample) ** 0.5 / 2 + len(flat)
        first, last = int(place - spread), int(place + spread) + 1
        lowest = sample[first] if first >= 0 else sample.new_zeros(())
        highest = sample[last] if last < len(sample) else sample.new_full((), torch.inf)
        below, within = 0, []
        for part in flat:
            for piece in part.split(_NEAR if part.device.type == "cpu" else _PIECE):
                values = piece.abs()
                inside = values >= lowest
                below += len(values) - int(inside.count_nonzero())
                within.append(values[inside.logical_and_(values <= highest)])
        near = torch.cat(within)
        if below < rank <= below + len(near):
            return near.kthvalue(rank - below).values
    return torch.cat(flat).abs_().kthvalue(rank).values


def kth_magnitudes(pieces: Iterable[Mapping[str, Tensor]], rank: Callable[[int], int]) -> Tensor:
    """Return the magnitude of a given rank of every task, as sorting all of them would; see :func:`order_statistics`.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time.
        rank: Maps the number of entries per task to the rank, from 1 for the smallest.

    Returns:
        Magnitudes, ``(T,)``, at least float32; empty if there are no task vectors.

    >>> two = [{"w": torch.tensor([[5.0, -3.0], [0.5, 0.25]])}, {"b": torch.tensor([[-4.0], [-1.0]])}]
    >>> kth_magnitudes(two, lambda size: 2)
    tensor([4.0000, 0.5000])
    """
    return order_statistics(pieces, lambda size: [rank(size)], magnitudes=True)[0]


def order_statistics(
    pieces: Iterable[Mapping[str, Tensor]], ranks: Callable[[int], Sequence[int]], *, magnitudes: bool = False
) -> Tensor:
    """Return the entries of given ranks of every task, as sorting all of them would.

    The bits of floating-point numbers, read as integers and flipped where the sign is negative, are in the order of the
    numbers. So the leading 16 bits of the answer follow from a table of counts, and each further reading gives the
    next 16.

    Args:
        pieces: Vectors, ``(T, *shape)`` each, of some tensors at a time, or of parts of one; read twice, four times in
            float64. The entries are finite.
        ranks: Maps the number of entries per task to the R ranks, from 1 for the smallest; it is asked once.
        magnitudes: Rank the magnitudes instead.

    Returns:
        Entries, ``(R, T)``, at least float32; zero if there are none to choose from.

    >>> two = [{"w": torch.tensor([[5.0, -3.0], [0.5, 0.25]])}, {"b": torch.tensor([[-4.0], [-1.0]])}]
    >>> order_statistics(two, lambda size: [1, size])
    tensor([[-4.0000, -1.0000],
            [ 5.0000,  0.5000]])
    """
    prefixes: Tensor | None = None
    left = torch.zeros(0, dtype=torch.int64)
    shift, dtype = 0, torch.float32
    while True:
        counts: Tensor | None = None
        size = 0
        for piece in pieces:
            if counts is None and piece:
                some = next(iter(piece.values()))
                if prefixes is None:
                    dtype = wide(some[:0]).dtype
                    shift = torch.finfo(dtype).bits - _DIGIT
                counts = torch.zeros(1 if prefixes is None else len(prefixes), len(some), _SIZE, dtype=torch.int64)
                del some
            if counts is not None:
                size += _count(piece, counts, dtype, shift, prefixes, magnitudes)
            del piece  # before the next one is read
        if counts is None or not size:
            return torch.zeros(len(ranks(0)), 0 if counts is None else counts.shape[1], dtype=dtype)
        if prefixes is None:
            wanted = ranks(size)
            left = torch.tensor(wanted)[:, None].repeat(1, counts.shape[1])
            prefixes = torch.zeros_like(left)
            counts, half = counts.expand(len(wanted), -1, -1), 0 if magnitudes else _SIZE // 2
        else:
            half = 0
        cumulated = counts.cumsum(-1)
        digits = torch.searchsorted(cumulated, left[..., None])
        before = cumulated.gather(-1, (digits - 1).clamp(min=0))
        left -= torch.where(digits > 0, before, 0).squeeze(-1)
        prefixes = (prefixes << _DIGIT) + digits.squeeze(-1) - half
        if shift == 0:
            whole = torch.int32 if dtype == torch.float32 else torch.int64
            return _flipped(prefixes.to(whole)).view(dtype)
        shift -= _DIGIT


def _count(
    piece: Mapping[str, Tensor],
    counts: Tensor,
    dtype: torch.dtype,
    shift: int,
    prefixes: Tensor | None,
    magnitudes: bool,
) -> int:
    """Add to the counts ``(R, T, 65536)`` of the digits that follow a prefix; return the number of entries per task."""
    for delta in piece.values():
        for task, row in enumerate(delta):
            for part in row.reshape(-1).split(_PIECE):
                values = part.cpu().to(dtype)
                values = values.abs() if magnitudes else values + 0.0  # there is one zero, not two
                bits = values.view(torch.int32 if dtype == torch.float32 else torch.int64)
                bits = bits if magnitudes else _flipped(bits)
                if prefixes is None:
                    counts[0, task] += _histogram((bits >> shift) + (0 if magnitudes else _SIZE // 2))
                    continue
                for row_counts, prefix in zip(counts, prefixes[:, task].tolist(), strict=True):
                    chosen = bits[bits >> (shift + _DIGIT) == prefix]
                    row_counts[task] += _histogram(chosen >> shift & (_SIZE - 1))
    return sum(delta[0].numel() for delta in piece.values())


def _flipped(bits: Tensor) -> Tensor:
    """Make integers that are in the order of the numbers of these bits; and back again."""
    most = torch.iinfo(bits.dtype).max
    return torch.where(bits < 0, bits ^ most, bits)


def _histogram(digits: Tensor) -> Tensor:
    return torch.bincount(digits, minlength=_SIZE)
