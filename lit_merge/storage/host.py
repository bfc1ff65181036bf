"""HostStorage: base and task vectors in the host's memory, wherever the arithmetic is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lit_merge.storage.ahead import CudaSignals, Signals, rotate
from lit_merge.storage.base import Layout, Storage
from lit_merge.storage.dense import DenseBlock, difference
from lit_merge.storage.page_lock import PageLock

__all__ = ("HostStorage", "Room")


class HostStorage(Storage):
    """What :class:`~lit_merge.storage.dense.DenseStorage` is, in memory that stays where it is.

    Where the arithmetic is on a CUDA device, the memory is page-locked and a walk copies the next tensor on a stream
    of its own while the present one is used; the device holds two tensors of the bank at a time. Where it is on the
    CPU, a walk hands out views, in the very layout of a dense storage: the results have the same bits.

    Args:
        layout: See :class:`~lit_merge.storage.base.Storage`.
        base: See there.
        tasks: See there.
        dtype: See there.
        device: Where blocks come out, until the module is moved; by default where the base is.

    >>> from lit_merge.storage.base import layout_of
    >>> base = {"w": torch.tensor([1.0, 2.0])}
    >>> storage = HostStorage(layout_of(["w"], base), base, 1, torch.float32)
    >>> storage.put(0, 0, torch.tensor([3.0, 3.0]))
    >>> [block.merge(torch.tensor([0.5])) for _, block in storage.walk([0])]
    [tensor([2.0000, 2.5000])]
    >>> list(storage.buffers())  # nothing but the mark of where the arithmetic is
    [tensor([])]
    """

    _place: Tensor

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(layout, base, tasks, dtype)
        place = device or (base[layout.names[0]].device if layout.names else torch.device("cpu"))
        self.register_buffer("_place", torch.empty(0, device=place), persistent=False)
        self._locks: dict[str, PageLock] = {}
        self._base = self._allocate(len(layout), layout.wide)
        for name, part in zip(layout.names, layout.parts, strict=True):
            self._base[part] = base[name].detach().flatten().to(layout.wide)
            self._release(self._base[part])
        self._rows = self._allocate_rows()

    # Memory ------------------------------------------------------------------------------------------------------

    def _allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        """Return zeros ``(size,)`` on the host."""
        return torch.zeros(size, dtype=dtype, device="cpu")

    def _allocate_rows(self) -> Tensor:
        """Zeros ``(T, P)``, with the strides of a dense storage."""
        size = max(len(self.layout), 2)
        return self._allocate(self.tasks * size, self.dtype).view(self.tasks, size)[:, : len(self.layout)]

    def _release(self, part: Tensor) -> None:
        """Take notice that a part of the memory is not needed for now."""

    def _expect(self, column: int) -> None:
        """Take notice that a tensor will be needed soon."""

    def _prepare(self) -> None:
        """Lock the memory's pages, if the arithmetic is on a CUDA device; once."""
        if self.device.type != "cuda" or len(self._locks) == 2:
            return
        for name, part in (("base", self._base), ("rows", self._rows)):
            if name not in self._locks:
                self._locks[name] = PageLock(part, self.device)
        if not all(lock.held for lock in self._locks.values() if lock.size):
            rank_zero_info(
                "storage: the system does not allow to lock as much memory, so that task vectors go to the device more "
                "slowly; see `ulimit -l`"
            )

    # Reading and writing -----------------------------------------------------------------------------------------

    @property
    @override
    def device(self) -> torch.device:
        return self._place.device

    @property
    @override
    def lazy(self) -> bool:
        return True

    @override
    def put(self, row: int, column: int, value: Tensor) -> None:
        part = self.layout.parts[column]
        own = self._rows[row, part]
        own.copy_(difference(value, self._base[part], self.layout.compute_dtype))
        self._release(own)

    @override
    def finish(self) -> None:
        self._prepare()

    @override
    def block(self, column: int) -> DenseBlock:
        return DenseBlock(self.base(column), self.rows(column), self.layout.compute_dtype)

    @override
    def base(self, column: int) -> Tensor:
        return self._base[self.layout.parts[column]].to(self.device)

    @override
    def rows(self, column: int) -> Tensor:
        return self._rows[:, self.layout.parts[column]].to(self.device)

    @override
    def row(self, row: int, column: int) -> Tensor:
        return self._rows[row, self.layout.parts[column]].to(self.device)

    @override
    def walk(self, columns: Iterable[int]) -> Iterator[tuple[int, DenseBlock]]:
        order = list(columns)
        size = max((self.layout.sizes[column] for column in order), default=0)
        self._prepare()
        rooms = [self._room(size) for _ in range(2)] if self._copies else []
        if (signals := self._signals(rooms)) is not None:
            yield from rotate(order, lambda room, column: self._fill(rooms[room], column, room, signals), signals)
            return
        for place, column in enumerate(order, 1):
            if place < len(order):
                self._expect(order[place])
            yield column, self.block(column)
            self._leave(column)

    @override
    def replaced(self, deltas: Iterable[tuple[int, Tensor]]) -> Self:
        new = self._twin()
        new._rows = new._allocate_rows()
        for column, value in deltas:
            own = new._rows[:, self.layout.parts[column]]
            own.copy_(value)
            for row in own:
                new._release(row)
        new._prepare()
        return new

    def _twin(self) -> Self:
        """A storage with the same base, and the same task vectors until it is given others."""
        new = type(self).__new__(type(self))
        Storage.__init__(new, self.layout, {}, self.tasks, self.dtype)
        new.register_buffer("_place", self._place, persistent=False)
        new._base, new._rows = self._base, self._rows
        new._locks = {name: lock for name, lock in self._locks.items() if name == "base"}
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_locks": {}}

    # A walk that copies ------------------------------------------------------------------------------------------

    @property
    def _copies(self) -> bool:
        """Whether a walk copies ahead."""
        return self.device.type == "cuda"

    def _room(self, size: int) -> Room:
        """Room for tensors of up to ``size`` entries."""
        return Room(self, size)

    def _signals(self, rooms: list[Room]) -> Signals | None:
        """What orders the copies of a walk, if it copies ahead."""
        return CudaSignals(self.device) if rooms else None

    def _fill(self, room: Room, column: int, number: int, signals: Signals) -> DenseBlock:
        """Queue the copies of one tensor."""
        base, rows = room.of(self.layout.sizes[column])
        base.copy_(self._base[self.layout.parts[column]], non_blocking=True)
        for target, row in zip(rows, self._rows[:, self.layout.parts[column]], strict=True):  # contiguous pieces
            target.copy_(row, non_blocking=True)
        return DenseBlock(base, rows, self.layout.compute_dtype)

    def _leave(self, column: int) -> None:
        """Take notice that a tensor was used."""
        part = self.layout.parts[column]
        self._release(self._base[part])
        for row in self._rows[:, part]:
            self._release(row)


class Room:
    """Where one tensor of the bank at a time is copied to.

    Args:
        storage: What is copied.
        size: Entries of the largest tensor.
        device: Where it is; by default the device of the arithmetic.
        pinned: Whether it is page-locked memory of the host.

    Attributes:
        memory: Two flat tensors.
        staging: A room on the way to this one, if there is one.
    """

    def __init__(
        self, storage: Storage, size: int, device: torch.device | None = None, *, pinned: bool = False
    ) -> None:
        self._tasks, layout = storage.tasks, storage.layout
        self.staging: Room | None = None
        kind: dict[str, Any] = {"device": device or storage.device, "pin_memory": pinned}
        self.memory = (
            torch.empty(size, dtype=layout.wide, **kind),
            torch.empty(storage.tasks * max(size, 2), dtype=storage.dtype, **kind),
        )

    def of(self, size: int) -> tuple[Tensor, Tensor]:
        """Return room for base ``(n,)`` and task vectors ``(T, n)``, with the strides of one of many tensors."""
        base, rows = self.memory
        return base[:size], rows[: self._tasks * max(size, 2)].view(self._tasks, -1)[:, :size]
