"""DenseStorage: everything in memory, on the device of the module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from lit_merge.functional.contraction import inner_products, weighted_sum
from lit_merge.storage.base import Block, Layout, Storage

__all__ = ("DenseBlock", "DenseStorage", "difference", "zero_rows")


class DenseBlock(Block):
    """One tensor of the bank in memory.

    Args:
        base: ``(n,)``.
        rows: ``(T, n)``, in the dtype of the storage.
        dtype: Dtype of the arithmetic.
    """

    widens = True

    def __init__(self, base: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
        self._base, self._rows, self._dtype = base, rows, dtype

    @override
    def merge(self, weights: Tensor) -> Tensor:
        return weighted_sum(self._rows, weights, self.base())

    @override
    def merge_as(self, weights: Tensor, *types: torch.dtype) -> Tensor:
        return weighted_sum(self._rows, weights, self.base(), types)

    @override
    def offset(self, weights: Tensor) -> Tensor:
        return weighted_sum(self._rows, weights)

    @override
    def products(self, vector: Tensor) -> Tensor:
        return inner_products(self._rows, vector, self._dtype)

    @override
    def base(self) -> Tensor:
        return self._base.to(self._dtype)


class DenseStorage(Storage):
    """One contiguous row per task, in two non-persistent buffers that move with the module.

    Args:
        layout: See :class:`~lit_merge.storage.base.Storage`.
        base: See there.
        tasks: See there.
        dtype: See there.
        device: Where it is made, without a copy elsewhere; by default where the base is.

    >>> from lit_merge.storage.base import layout_of
    >>> base = {"w": torch.tensor([1.0, 2.0])}
    >>> storage = DenseStorage(layout_of(["w"], base), base, 1, torch.float32)
    >>> storage.put(0, 0, torch.tensor([3.0, 3.0]))
    >>> storage.block(0).merge(torch.tensor([0.5]))
    tensor([2.0000, 2.5000])
    """

    _base: Tensor
    _deltas: Tensor

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(layout, base, tasks, dtype)
        device = device or (base[layout.names[0]].device if layout.names else torch.device("cpu"))
        flat = torch.empty(len(layout), dtype=layout.wide, device=device)
        for name, part in zip(layout.names, layout.parts, strict=True):
            flat[part] = base[name].detach().flatten().to(layout.wide)
        self.register_buffer("_base", flat, persistent=False)
        self.register_buffer("_deltas", zero_rows(tasks, len(layout), dtype, device), persistent=False)

    @property
    @override
    def device(self) -> torch.device:
        return self._base.device

    @property
    @override
    def views(self) -> bool:
        return True

    @override
    def put(self, row: int, column: int, value: Tensor) -> None:
        self._deltas[row, self.layout.parts[column]] = difference(value, self.base(column), self.layout.compute_dtype)

    @override
    def block(self, column: int) -> DenseBlock:
        return DenseBlock(self.base(column), self.rows(column), self.layout.compute_dtype)

    @override
    def base(self, column: int) -> Tensor:
        return self._base[self.layout.parts[column]]

    @override
    def rows(self, column: int) -> Tensor:
        return self._deltas[:, self.layout.parts[column]]

    @override
    def replaced(self, deltas: Iterable[tuple[int, Tensor]]) -> Self:
        new = type(self).__new__(type(self))
        Storage.__init__(new, self.layout, {}, self.tasks, self.dtype)
        rows = zero_rows(self.tasks, len(self.layout), self.dtype, self.device)
        for column, value in deltas:
            rows[:, self.layout.parts[column]] = value.to(self.dtype)
        new.register_buffer("_base", self._base, persistent=False)
        new.register_buffer("_deltas", rows, persistent=False)
        return new


def difference(value: Tensor, base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``value`` − base, flat.

    Args:
        value: ``(*shape)``; it is not changed.
        base: ``(n,)``.
        dtype: Dtype of the subtraction.
    """
    wide = value.detach().flatten().to(base.device, dtype)
    return wide.sub_(base) if wide.dtype != value.dtype else wide - base  # a copy is ours


def zero_rows(tasks: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros ``(T, P)``.

    A single column has the stride of one of many, as that decides on the order of sums over T.
    """
    return torch.zeros(tasks, max(size, 2), dtype=dtype, device=device)[:, :size]
