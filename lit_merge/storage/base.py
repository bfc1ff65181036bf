"""What a storage of task vectors has to do: hand out the tensors of the bank, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from typing_extensions import override

__all__ = ("Block", "Layout", "Storage", "StorageFactory", "layout_of")


@dataclass(frozen=True)
class Layout:
    """Where each tensor is in a flat vector of all entries.

    Attributes:
        names: Names of the tensors, in their order: the columns of coefficients.
        parts: Entries of each.
        shapes: Shape of each.
        dtypes: Dtype of each, which is that of the merged tensor.
        wide: The widest dtype among them, in which the base is held, so that every tensor comes back exactly.
    """

    names: tuple[str, ...]
    parts: tuple[slice, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    wide: torch.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of all arithmetic: the widest, but at least float32."""
        return torch.promote_types(self.wide, torch.float32)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(part.stop - part.start for part in self.parts)

    def __len__(self) -> int:
        """Number of entries of all tensors."""
        return self.parts[-1].stop if self.parts else 0

    def columns(self) -> dict[str, int]:
        """Number of each tensor."""
        return {name: column for column, name in enumerate(self.names)}


def layout_of(names: Sequence[str], base: Mapping[str, Tensor], widest: torch.dtype | None = None) -> Layout:
    """Lay out the tensors one after the other.

    Args:
        names: Names of the tensors, in their order.
        base: Where to look up shapes and dtypes; may be lazy.
        widest: Dtype that the base is held in at least.

    >>> layout_of(["w", "b"], {"w": torch.zeros(2, 3), "b": torch.zeros(2)}).parts
    (slice(0, 6, None), slice(6, 8, None))
    """
    parts, shapes, dtypes, start = [], [], [], 0
    for name in names:
        value = base[name]
        parts.append(slice(start, start := start + value.numel()))
        shapes.append(value.shape)
        dtypes.append(value.dtype)
    wide = widest or (dtypes[0] if dtypes else torch.float32)
    for dtype in dtypes:
        wide = torch.promote_types(wide, dtype)
    return Layout(tuple(names), tuple(parts), tuple(shapes), tuple(dtypes), wide)


class Block(ABC):
    """One tensor of the bank while it is at hand: base ``(n,)`` and task vectors ``(T, n)``, on the compute device.

    All arithmetic is in ``Layout.compute_dtype``, whatever the task vectors are kept in.

    Attributes:
        widens: Whether :meth:`products` takes vectors in any type.
    """

    widens = False

    @abstractmethod
    def merge(self, weights: Tensor) -> Tensor:
        """Return θ0 + Σ_t w_t τ_t, ``(n,)``, for weights ``(T,)``."""

    def merge_as(self, weights: Tensor, *types: torch.dtype) -> Tensor:
        """Return what :meth:`merge` does in another type.

        Args:
            weights: ``(T,)``.
            types: Through which of them the result goes, the last one being its own.
        """
        found = self.merge(weights)
        for dtype in types:
            found = found.to(dtype)
        return found

    @abstractmethod
    def offset(self, weights: Tensor) -> Tensor:
        """Return Σ_t w_t τ_t, ``(n,)``, for weights ``(T,)``."""

    def masked(self, weights: Tensor, factor: Tensor) -> Tensor:
        """Return θ0 + f ⊙ Σ_t w_t τ_t, ``(n,)``, for weights ``(T,)`` and factors ``(n,)``."""
        return torch.addcmul(self.base(), factor, self.offset(weights))

    @abstractmethod
    def products(self, vector: Tensor) -> Tensor:
        """Return ⟨τ_t, v⟩, ``(T,)``, for a vector ``(n,)``; of all tensors together, :meth:`Storage.total` makes sums.

        Where ranks share one bank this is a part of a sum over ranks: that of the products with the mean of their
        vectors, as each of them has images of its own.
        """

    @abstractmethod
    def base(self) -> Tensor:
        """Return θ0, ``(n,)``."""


class Storage(nn.Module, ABC):
    """Base ``(P,)`` and task vectors ``(T, P)``.

    Where it is :attr:`shared`, a storage may talk to the other ranks in any of its methods but :meth:`put`.

    Args:
        layout: The tensors.
        base: Where to read the base's tensors, once.
        tasks: Number of task vectors; they are zeros until they are put.
        dtype: Storage of the task vectors.

    Attributes:
        layout: The tensors.
        tasks: Number of task vectors.
        dtype: Storage of the task vectors.
    """

    def __init__(self, layout: Layout, base: Mapping[str, Tensor], tasks: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layout, self.tasks, self.dtype = layout, tasks, dtype

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where blocks come out."""

    @property
    def shared(self) -> bool:
        """Whether ranks hold it together: all of them then ask for the same things, in the same order."""
        return False

    @property
    def views(self) -> bool:
        """Whether :meth:`rows` are views that cost nothing and can be written through."""
        return False

    @property
    def lazy(self) -> bool:
        """Whether the bank may be larger than the memory of :attr:`device`, so that nothing should ask for all of it.

        Transforms then take it tensor by tensor where they can, see :meth:`lit_merge.TaskVectors.map`.
        """
        return False

    @abstractmethod
    def put(self, row: int, column: int, value: Tensor) -> None:
        """Store the task vector of an expert's tensor: ``value`` − base, subtracted in the compute dtype.

        Args:
            row: Number of the task.
            column: Number of the tensor.
            value: The expert's, ``(*shape)``, in its own dtype. It is not kept.
        """

    def finish(self) -> None:
        """Take notice that everything has been put."""

    @abstractmethod
    def block(self, column: int) -> Block:
        """Return one tensor."""

    def walk(self, columns: Iterable[int]) -> Iterator[tuple[int, Block]]:
        """Return tensors one after the other; a storage that has to fetch them fetches the next one meanwhile."""
        for column in columns:
            yield column, self.block(column)

    @abstractmethod
    def base(self, column: int) -> Tensor:
        """Return the base's tensor on the compute device, ``(n,)`` in ``layout.wide``."""

    @abstractmethod
    def rows(self, column: int) -> Tensor:
        """Return the task vectors of a tensor on the compute device, ``(T, n)`` in :attr:`dtype`."""

    def row(self, row: int, column: int) -> Tensor:
        """Return one of these, ``(n,)``."""
        return self.rows(column)[row]

    def expert(self, row: int, column: int) -> Tensor:
        """Return base + task vector, ``(n,)`` in the compute dtype."""
        return self.base(column) + self.row(row, column).to(self.layout.compute_dtype)

    def total(self, products: Tensor) -> Tensor:
        """Complete what :meth:`Block.products` gave for all tensors of a pass, ``(T, L)``."""
        return products

    def anyone(self, flag: bool) -> bool:
        """Whether the flag is set on any of the ranks that share it."""
        return flag

    @abstractmethod
    def replaced(self, deltas: Iterable[tuple[int, Tensor]]) -> Self:
        """Return a storage with the same base and other task vectors.

        Args:
            deltas: Number and new task vectors ``(T, n)`` of every tensor, one after the other.
        """

    def report(self) -> dict[str, object]:
        """Return plain data on what was lost, for the report; nothing if nothing was."""
        return {}

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move, but keep the types: ``Module.to(dtype)``, as of a Trainer in ``bf16-true``, would round the bank."""

        def moved(value: Tensor) -> Tensor:
            found = fn(value)
            return found if found.dtype == value.dtype else value.to(found.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call, unused-ignore]
        return self


StorageFactory = Callable[[Layout, Mapping[str, Tensor], int, torch.dtype], Storage]
"""Makes a storage out of layout, base, number of tasks and dtype of the task vectors."""
