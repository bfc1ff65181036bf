"""Which storage a bank gets: the option ``model.storage``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lit_merge.errors import MergeError
from lit_merge.storage.base import Layout, Storage
from lit_merge.storage.dense import DenseStorage
from lit_merge.storage.free_memory import free_memory, host_memory
from lit_merge.storage.host import HostStorage
from lit_merge.storage.low_rank import LowRankStorage, check_rank
from lit_merge.storage.mmap import MappedStorage

__all__ = ("StorageChoice", "StorageKind")

StorageKind = Literal["auto", "device", "host", "mmap", "low_rank", "sharded"]

_SHARE = 0.8  # of what is free; the rest is for activations and for what others take meanwhile


@dataclass(frozen=True)
class StorageChoice:
    """What was asked for, and where; called as a :data:`~lit_merge.storage.base.StorageFactory` it makes the storage.

    =============  ================================================================================================
    ``device``     in the memory of the device that computes: the fastest, and what is meant without this option
    ``host``       in the host's memory; tensors are copied to the device as they are used
    ``mmap``       in a file on disk, of which the system keeps in memory what it has room for
    ``low_rank``   on the device, matrices by their leading singular directions; the only one that changes results
    ``sharded``    on the devices of all ranks, a part on each, see :func:`~lit_merge.storage.sharded.sharded_over`
    ``auto``       the first of ``device``, ``host`` and ``mmap`` that has room
    =============  ================================================================================================

    Room is 80 % of what is free, less two networks for merged weights and gradients on the device. Ranks choose by
    themselves and need not agree: all that ``auto`` chooses from have the same bits, and none talks to other ranks.

    Args:
        kind: Of these.
        rank: Of ``low_rank``, see :class:`~lit_merge.storage.low_rank.LowRankStorage`.
        budget: Bytes for base and task vectors on the device, in place of what is measured.
        folder: Of ``mmap``, see :class:`~lit_merge.storage.mmap.MappedStorage`.
        device: Which one computes; by default the one that the base is on.
        made_on: Where to make what is on the device, if not there at once: it is moved later.
        ranks: Processes that share the host's memory.
        copies: Banks that there are for a moment; a transform makes one out of another.

    Raises:
        MergeError: A value is out of range.
    """

    kind: StorageKind = "auto"
    rank: int | float = 0.25
    budget: int | None = None
    folder: str | None = None
    device: torch.device | None = None
    made_on: torch.device | None = None
    ranks: int = 1
    copies: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(StorageKind):
            raise MergeError(f"model.storage: expected {', '.join(get_args(StorageKind))}, found {self.kind!r}")
        if self.budget is not None and self.budget < 0:
            raise MergeError(f"model.storage_budget: expected bytes, 0 or more, found {self.budget}")
        check_rank(self.rank)

    def __call__(self, layout: Layout, base: Mapping[str, Tensor], tasks: int, dtype: torch.dtype) -> Storage:
        """Choose and make a storage; say which one, and why, unless that is what was asked for.

        Raises:
            MergeError: ``sharded`` was asked for, which takes ranks.
        """
        if self.kind == "sharded":
            raise MergeError("storage: sharded: the ranks are not known here; give sharded_over(RankGroup()) instead")
        device = self.device or (base[layout.names[0]].device if layout.names else torch.device("cpu"))
        kind, why = self.decided(layout, tasks, dtype, device)
        if self.kind == "auto":
            rank_zero_info(f"storage: {kind}: {why}")
        made_on = self.made_on or device
        if kind == "host":
            return HostStorage(layout, base, tasks, dtype, made_on)
        if kind == "mmap":
            return MappedStorage(layout, base, tasks, dtype, made_on, self.folder)
        if kind == "low_rank":
            return LowRankStorage(layout, base, tasks, dtype, made_on, self.rank)
        return DenseStorage(layout, base, tasks, dtype, made_on)

    def decided(self, layout: Layout, tasks: int, dtype: torch.dtype, device: torch.device) -> tuple[StorageKind, str]:
        """Return what there is room for, and why, in words.

        Args:
            layout: The tensors.
            tasks: Number of task vectors.
            dtype: Storage of the task vectors.
            device: Which one computes.

        Raises:
            MergeError: ``device`` was asked for, and it is more than was allowed.
        """
        network = len(layout) * layout.wide.itemsize
        rows = len(layout) * tasks * dtype.itemsize
        needs, most = network + rows, network + rows * self.copies
        if self.kind != "auto":
            if self.kind == "device" and self.budget is not None and needs > self.budget:
                raise MergeError(
                    f"model.storage: device: base and task vectors take {needs:,} bytes, and model.storage_budget is "
                    f"{self.budget:,}; use auto, host, mmap or low_rank, or storage_dtype: bfloat16"
                )
            return self.kind, "as asked for"
        size = f"base and task vectors take {_words(needs)}"
        host = device.type == "cpu"
        room = self.budget
        if room is None:
            room = max(0, int(_SHARE * free_memory(device)) // (self.ranks if host else 1) - 2 * network)
        there = f"{_words(room)} {'may be used' if self.budget is None else 'are allowed'} on {device}"
        if most <= room or needs == 0:
            return "device", f"{size}, and {there}"
        if not host:
            free = int(_SHARE * host_memory()) // self.ranks
            if most <= free:
                return "host", f"{size}, and only {there}; {_words(free)} may be used of the host's memory"
            there += f" and {_words(free)} of the host's memory"
        return "mmap", f"{size}, and only {there}"


def _words(size: int) -> str:
    """Return bytes in words.

    >>> _words(12), _words(3_400_000_000)
    ('12 bytes', '3.40 GB')
    """
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size} bytes"
