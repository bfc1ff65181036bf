"""ShardedStorage: each of W ranks holds 1/W of the base and of every task vector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import accumulate, pairwise
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lit_merge.storage.base import Block, Layout, Storage, StorageFactory
from lit_merge.storage.dense import DenseBlock, difference, zero_rows
from lit_merge.storage.ranks import RankGroup

__all__ = ("ShardedBlock", "ShardedStorage", "WholeBlock", "sharded_over")

WHOLE = 2**14
"""Entries up to which every rank holds the whole tensor: sending fewer takes no longer than saying so."""


class WholeBlock(DenseBlock):
    """A small tensor, which every rank has.

    Args:
        base: ``(n,)``.
        rows: ``(T, n)``, in the dtype of the storage.
        dtype: Dtype of the arithmetic.
        ranks: Number of ranks.
    """

    def __init__(self, base: Tensor, rows: Tensor, dtype: torch.dtype, ranks: int) -> None:
        super().__init__(base, rows, dtype)
        self._ranks = ranks

    @override
    def products(self, vector: Tensor) -> Tensor:
        return super().products(vector) / self._ranks  # the sum over ranks is that with the mean of their vectors


class ShardedBlock(Block):
    """One tensor of which every rank has a shard ``(s,)``.

    Args:
        shard: This rank's.
        size: Entries of the tensor, n.
        group: The ranks.
    """

    def __init__(self, shard: DenseBlock, size: int, group: RankGroup) -> None:
        self._shard, self._size, self._group = shard, size, group

    @override
    def merge(self, weights: Tensor) -> Tensor:
        return self._group.gather(self._shard.merge(weights), self._size)

    @override
    def merge_as(self, weights: Tensor, *types: torch.dtype) -> Tensor:
        return self._group.gather(self._shard.merge_as(weights, *types), self._size)  # sent in the narrower type

    @override
    def offset(self, weights: Tensor) -> Tensor:
        return self._group.gather(self._shard.offset(weights), self._size)

    @override
    def masked(self, weights: Tensor, factor: Tensor) -> Tensor:
        own = self._group.own(factor)
        own = pad(own, (0, self._group.shard(self._size) - len(own)))
        return self._group.gather(self._shard.masked(weights, own), self._size)  # merged first: sent once

    @override
    def products(self, vector: Tensor) -> Tensor:
        return self._shard.products(self._group.scatter_mean(vector))

    @override
    def base(self) -> Tensor:
        return self._group.gather(self._shard.base(), self._size)


class ShardedStorage(Storage):
    """Shards of all tensors in two non-persistent buffers, and the collectives that make tensors of them.

    Rank r holds the entries [r·s, (r + 1)·s) of a tensor with n entries, s = ⌈n / W⌉. Per step and tensor there are an
    all-gather of what it merged and a reduce-scatter of the gradient, and per step one sum over the ranks of the
    ``(T, L)`` products. That is the gradient of the mean of the ranks' losses on all of them; taking the mean over
    ranks once more, as DistributedDataParallel does, changes nothing. Tensors of at most 2¹⁴ entries (biases,
    normalisation: less than 1 % of a network) are whole on every rank, so that no time is spent on many small messages.

    Memory per rank: (T + 1) / W networks and the small tensors. What is merged is whole on every rank.

    Args:
        layout: The tensors.
        base: Where to read the base's tensors, once; only shards are kept.
        tasks: Number of task vectors.
        dtype: Storage of the task vectors.
        group: The ranks that hold it.
        device: Where; by default where the base is. Collectives of NCCL are for CUDA.
    """

    _base: Tensor
    _deltas: Tensor

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype,
        group: RankGroup,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(layout, base, tasks, dtype)
        self._arrange(group)
        size = self._parts[-1].stop if self._parts else 0
        device = device or (base[layout.names[0]].device if layout.names else torch.device("cpu"))
        self.register_buffer("_base", torch.zeros(size, dtype=layout.wide, device=device), persistent=False)
        self.register_buffer("_deltas", zero_rows(tasks, size, dtype, device), persistent=False)
        for column, name in enumerate(layout.names):
            own = self._own(column, base[name].detach())
            self._base[self._filled(column, own)] = own.to(device, layout.wide)

    def _arrange(self, group: RankGroup) -> None:
        """Find out where each tensor's shard is."""
        self.group = group
        self._whole = tuple(size <= WHOLE for size in self.layout.sizes)
        own = [size if whole else group.shard(size) for size, whole in zip(self.layout.sizes, self._whole, strict=True)]
        self._parts = tuple(slice(*span) for span in pairwise(accumulate(own, initial=0)))

    def _own(self, column: int, value: Tensor) -> Tensor:
        """What this rank keeps of a tensor, flat."""
        return value.flatten() if self._whole[column] else self.group.own(value.flatten())

    def _filled(self, column: int, own: Tensor) -> slice:
        """Where that goes; what is behind it stays zero."""
        start = self._parts[column].start
        return slice(start, start + len(own))

    @property
    @override
    def device(self) -> torch.device:
        return self._base.device

    @property
    @override
    def shared(self) -> bool:
        return True

    @property
    @override
    def lazy(self) -> bool:
        return True

    @override
    def put(self, row: int, column: int, value: Tensor) -> None:
        own = self._own(column, value.detach())
        part = self._filled(column, own)
        self._deltas[row, part] = difference(own, self._base[part], self.layout.compute_dtype)

    @override
    def block(self, column: int) -> Block:
        part, dtype = self._parts[column], self.layout.compute_dtype
        base, rows = self._base[part], self._deltas[:, part]
        if self._whole[column]:
            return WholeBlock(base, rows, dtype, self.group.size)
        return ShardedBlock(DenseBlock(base, rows, dtype), self.layout.sizes[column], self.group)

    @override
    def base(self, column: int) -> Tensor:
        return self._made(column, self._base[self._parts[column]])

    @override
    def rows(self, column: int) -> Tensor:
        own = self._deltas[:, self._parts[column]]
        return own if self._whole[column] else self.group.gather_rows(own, self.layout.sizes[column])

    @override
    def row(self, row: int, column: int) -> Tensor:
        return self._made(column, self._deltas[row, self._parts[column]])

    @override
    def expert(self, row: int, column: int) -> Tensor:
        part = self._parts[column]
        return self._made(column, self._base[part] + self._deltas[row, part].to(self.layout.compute_dtype))

    def _made(self, column: int, own: Tensor) -> Tensor:
        """Make a tensor ``(n,)`` of this rank's shard and the others'."""
        return own if self._whole[column] else self.group.gather(own, self.layout.sizes[column])

    @override
    def total(self, products: Tensor) -> Tensor:
        return self.group.total(products)

    @override
    def anyone(self, flag: bool) -> bool:
        return self.group.anyone(flag, self.device)

    @override
    def replaced(self, deltas: Iterable[tuple[int, Tensor]]) -> Self:
        new = type(self).__new__(type(self))
        Storage.__init__(new, self.layout, {}, self.tasks, self.dtype)
        new._arrange(self.group)
        rows = zero_rows(self.tasks, len(self._base), self.dtype, self.device)
        for column, value in deltas:
            for row, vector in enumerate(value):
                own = self._own(column, vector)
                rows[row, self._filled(column, own)] = own.to(self.dtype)
        new.register_buffer("_base", self._base, persistent=False)
        new.register_buffer("_deltas", rows, persistent=False)
        return new


def sharded_over(group: RankGroup, device: torch.device | None = None) -> StorageFactory:
    """Return what makes a :class:`ShardedStorage` for ``TaskVectors.from_state_dicts(storage=…)``.

    Args:
        group: The ranks that hold it.
        device: Where each of them holds its share; by default where the base is.
    """

    def make(layout: Layout, base: Mapping[str, Tensor], tasks: int, dtype: torch.dtype) -> ShardedStorage:
        return ShardedStorage(layout, base, tasks, dtype, group, device)

    return make
