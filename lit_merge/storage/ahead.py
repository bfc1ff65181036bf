"""Filling rooms on one stream while another one uses those that were filled before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeVar

import torch
from typing_extensions import override

__all__ = ("CudaSignals", "Signals", "rotate")

Item = TypeVar("Item")
Filled = TypeVar("Filled")


class Signals(ABC):
    """What orders a stream that fills rooms and one that uses them; the processor itself waits in :meth:`settle` only.

    A room counts as used at the beginning.
    """

    @abstractmethod
    def filling(self, room: int) -> AbstractContextManager[None]:
        """Return a context for filling a room: what is queued in it waits for :meth:`used` of this room."""

    @abstractmethod
    def await_filled(self, room: int) -> None:
        """Let what is queued from now on wait until the room is filled."""

    @abstractmethod
    def used(self, room: int) -> None:
        """Say that what was queued until now was all that uses the room."""

    @abstractmethod
    def settle(self, room: int) -> None:
        """Wait on the processor until the room is filled, if filling it ever began."""


class CudaSignals(Signals):
    """Events between the current stream, which uses the rooms, and a side stream, which fills them.

    The rooms are memory that was allocated for the current stream. That can be given up when :func:`rotate` ends, as
    the current stream has waited for all that the side stream does with it; ``Tensor.record_stream`` would keep it from
    being used again until that is done, and a processor that is ahead would need new rooms for every walk.

    Args:
        device: A CUDA device.
        rooms: Number of rooms.
    """

    def __init__(self, device: torch.device, rooms: int = 2) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._filled = [torch.cuda.Event() for _ in range(rooms)]
        self._used = [torch.cuda.Event() for _ in range(rooms)]
        for room in range(rooms):  # the memory may be recycled from what the current stream still works on
            self.used(room)

    @override
    @contextmanager
    def filling(self, room: int) -> Iterator[None]:
        self._side.wait_event(self._used[room])
        with torch.cuda.stream(self._side):
            try:
                yield
            finally:  # what was queued before an error, too
                self._filled[room].record(self._side)

    @override
    def await_filled(self, room: int) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._filled[room])

    @override
    def used(self, room: int) -> None:
        self._used[room].record(torch.cuda.current_stream(self._device))

    @override
    def settle(self, room: int) -> None:
        self._filled[room].synchronize()


def rotate(
    items: Iterable[Item], fill: Callable[[int, Item], Filled], signals: Signals, rooms: int = 2
) -> Iterator[tuple[Item, Filled]]:
    """Fill rooms in turn, one ahead of the one that is used.

    Args:
        items: What to fill them with.
        fill: Queues the filling of a room, given by number, with an item; returns what there will be to use.
        signals: Orders the two streams.
        rooms: Number of rooms, at least 2.

    Yields:
        Item and what it was filled into, which is good until the next one is asked for.
    """
    numbered = enumerate(items)
    ahead: deque[tuple[int, Item, Filled]] = deque()

    def fill_next() -> None:
        for number, item in numbered:
            room = number % rooms
            with signals.filling(room):
                ahead.append((room, item, fill(room, item)))
            return

    try:
        fill_next()
        while ahead:
            room, item, filled = ahead.popleft()
            fill_next()
            signals.await_filled(room)
            yield item, filled
            signals.used(room)
    finally:  # whoever gets the memory next comes after what is still being filled, if not all was asked for
        for room in range(rooms):
            signals.await_filled(room)
