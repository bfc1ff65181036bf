"""Exact order statistics of long vectors: by a sample in memory, by the bits of the entries where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from lit_merge.functional.scopes import wide

__all__ = ("kth_magnitude", "kth_magnitudes")

_DIGIT = 16  # bits that are decided on in one reading: a table of 65536 counts per task
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
    """Return the magnitude of a given rank of every task, as sorting all of them would.

    The bits of floating-point magnitudes, read as integers, are in the order of the magnitudes. So the leading 16 bits
    of the answer follow from a table of counts, and each further reading gives the next 16.

    Args:
        pieces: Task vectors, ``(T, *shape)`` each, of some tensors at a time; read twice, four times in float64. The
            entries are finite.
        rank: Maps the number of entries per task to the rank, from 1 for the smallest.

    Returns:
        Magnitudes, ``(T,)``, at least float32; empty if there are no task vectors.

    >>> two = [{"w": torch.tensor([[5.0, -3.0], [0.5, 0.25]])}, {"b": torch.tensor([[-4.0], [-1.0]])}]
    >>> kth_magnitudes(two, lambda size: 2)
    tensor([4.0000, 0.5000])
    """
    prefixes: list[int] = []
    left: list[int] = []
    shift, dtype = 16, torch.float32
    while True:
        counts: Tensor | None = None
        size = 0
        for piece in pieces:
            if counts is None and piece:
                some = next(iter(piece.values()))
                dtype = wide(some[:0]).dtype
                shift = shift if prefixes else torch.finfo(dtype).bits - _DIGIT
                counts = torch.zeros(len(some), 2**_DIGIT, dtype=torch.int64)
                del some
            if counts is not None:
                size += _count(piece, counts, dtype, shift, prefixes)
            del piece  # before the next one is read
        if counts is None or not size:
            return torch.zeros(0 if counts is None else len(counts), dtype=dtype)
        if not prefixes:
            prefixes, left = [0] * len(counts), [rank(size)] * len(counts)
        for task, row in enumerate(counts.cumsum(1)):
            digit = int(torch.searchsorted(row, left[task]))
            left[task] -= int(row[digit - 1]) if digit else 0
            prefixes[task] = prefixes[task] << _DIGIT | digit
        if shift == 0:
            whole = torch.int32 if dtype == torch.float32 else torch.int64
            return torch.tensor(prefixes, dtype=whole).view(dtype)
        shift -= _DIGIT


def _count(piece: Mapping[str, Tensor], counts: Tensor, dtype: torch.dtype, shift: int, prefixes: Sequence[int]) -> int:
    """Add to the counts ``(T, 65536)``; return the number of entries per task."""
    for delta in piece.values():
        for task, row in enumerate(delta):
            for part in row.reshape(-1).split(_PIECE):
                counts[task] += _histogram(part.cpu().to(dtype), shift, prefixes[task] if prefixes else None)
    return sum(delta[0].numel() for delta in piece.values())


def _histogram(values: Tensor, shift: int, prefix: int | None) -> Tensor:
    """Count the digit at ``shift`` of the magnitudes that begin with ``prefix``."""
    bits = values.abs().view(torch.int32 if values.dtype == torch.float32 else torch.int64)
    if prefix is not None:
        bits = bits[bits >> (shift + _DIGIT) == prefix]
    return torch.bincount(bits >> shift & (2**_DIGIT - 1), minlength=2**_DIGIT)
