"""MappedStorage: base and task vectors in a file that has no name."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lit_merge.errors import MergeError
from lit_merge.storage.ahead import Signals
from lit_merge.storage.base import Layout
from lit_merge.storage.dense import DenseBlock
from lit_merge.storage.free_memory import in_memory
from lit_merge.storage.host import HostStorage, Room

__all__ = ("MappedStorage",)

_LEAST = 2**16  # bytes of which it is worth saying whether they are needed


class MappedStorage(HostStorage):
    """What :class:`~lit_merge.storage.host.HostStorage` is, on disk: of the memory only as much as is free is used.

    The system keeps in memory what it has room for. The file has no name from the beginning, so nothing is left
    behind, however the process ends. Forked processes and copies share it; a process that reads the experts by itself
    has a file of its own. Where the arithmetic is on a CUDA device, a walk goes by way of two page-locked tensors.

    Args:
        layout: See :class:`~lit_merge.storage.base.Storage`.
        base: See there.
        tasks: See there.
        dtype: See there.
        device: See :class:`~lit_merge.storage.host.HostStorage`.
        folder: Where the file is, on a disk and not in memory; by default the system's folder for temporary files,
            which the environment variable ``TMPDIR`` names.

    Raises:
        MergeError: There is no such folder, or no room in it.
    """

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        self.__dict__["_folder"] = Path(folder or tempfile.gettempdir()).expanduser()  # before nn.Module is there
        self.__dict__["_files"] = []
        _check_room(self._folder, len(layout) * (layout.wide.itemsize + tasks * dtype.itemsize))
        if in_memory(self._folder):
            rank_zero_info(
                f"storage: mmap: {self._folder} is in memory itself, so that nothing is saved; give a storage_folder "
                "on a disk, or set TMPDIR"
            )
        super().__init__(layout, base, tasks, dtype, device)

    _folder: Path
    _files: list[_File]

    @override
    def _allocate(self, size: int, dtype: torch.dtype) -> Tensor:
        file = _File(self._folder, size * dtype.itemsize)
        self._files.append(file)
        return torch.frombuffer(file.memory, dtype=dtype, count=size) if size else torch.empty(0, dtype=dtype)

    @override
    def _release(self, part: Tensor) -> None:
        self._advise(part, "MADV_DONTNEED")

    @override
    def _expect(self, column: int) -> None:
        part = self.layout.parts[column]
        for piece in (self._base[part], *self._rows[:, part]):
            self._advise(piece, "MADV_WILLNEED")

    def _advise(self, part: Tensor, what: str) -> None:
        """Tell the system of a contiguous part; what is there does not change."""
        if part.nbytes >= _LEAST:
            for file in self._files:
                file.advise(part, what)

    @override
    def _prepare(self) -> None:
        """Lock nothing: what is locked would have to be in memory."""

    @override
    def _room(self, size: int) -> Room:
        room = super()._room(size)
        room.staging = Room(self, size, torch.device("cpu"), pinned=self.device.type == "cuda")
        return room

    @override
    def _fill(self, room: Room, column: int, number: int, signals: Signals) -> DenseBlock:
        assert room.staging is not None
        part, size = self.layout.parts[column], self.layout.sizes[column]
        targets, ways = room.of(size), room.staging.of(size)
        signals.settle(number)  # the last copy out of the staging room
        for target, way, source in zip(targets, ways, (self._base[part], self._rows[:, part]), strict=True):
            target.copy_(way.copy_(source), non_blocking=True)
        self._leave(column)
        return DenseBlock(*targets, self.layout.compute_dtype)

    # Copies ------------------------------------------------------------------------------------------------------

    @override
    def _twin(self) -> Self:
        _check_room(self._folder, len(self.layout) * self.tasks * self.dtype.itemsize)
        new = super()._twin()
        new._folder, new._files = self._folder, self._files[:1]
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Share the file: nothing is written to it any more."""
        new = type(self).__new__(type(self))
        new.__dict__.update({k: copy(value) if isinstance(value, dict) else value for k, value in vars(self).items()})
        new._place = self._place.clone()
        return new

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_files": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        base, rows = self._base, self._rows
        _check_room(self._folder, base.nbytes + rows.nbytes)
        self._base = self._allocate(len(base), base.dtype).copy_(base)
        self._rows = self._allocate_rows().copy_(rows)


class _File:
    """A file without a name, in the address space.

    Args:
        folder: Where it is.
        size: Bytes; they are taken from the disk at once, since a write that found none later would end the process.
    """

    def __init__(self, folder: Path, size: int) -> None:
        with tempfile.TemporaryFile(dir=folder, prefix="lit-merge-") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, max(size, 1))
            except (AttributeError, OSError) as error:  # not everywhere
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                    raise _no_room(folder, size) from None
                file.truncate(max(size, 1))
            self.memory = mmap.mmap(file.fileno(), max(size, 1))  # keeps the file open
        self._start = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    def advise(self, part: Tensor, what: str) -> None:
        """Tell the system about a contiguous part, if it lies in this file."""
        first, advice = part.data_ptr() - self._start, getattr(mmap, what, None)
        if advice is None or not 0 <= first < len(self.memory):
            return
        start = first - first % mmap.PAGESIZE
        self.memory.madvise(advice, start, min(first + part.nbytes, len(self.memory)) - start)


def _check_room(folder: Path, size: int) -> None:
    if not folder.is_dir():
        raise MergeError(f"storage_folder: {folder}: expected a folder, found none; make it, or give another one")
    if shutil.disk_usage(folder).free < size:
        raise _no_room(folder, size)


def _no_room(folder: Path, size: int) -> MergeError:
    return MergeError(
        f"storage_folder: {folder}: base and task vectors need {size:,} bytes, and {shutil.disk_usage(folder).free:,} "
        "are free; give another folder, or keep less with storage_dtype: bfloat16 or storage: low_rank"
    )
