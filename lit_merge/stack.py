"""Arithmetic of the bank: what merges its tensors, and what brings gradients back; see lit_merge.storage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from lit_merge.contract import WayBack, contract
from lit_merge.errors import MergeError
from lit_merge.functional.masked import Mask, pulled
from lit_merge.storage.base import Block, Storage, StorageFactory, layout_of
from lit_merge.storage.dense import DenseStorage

__all__ = ("Stack", "StackPieces")


class Stack(nn.Module):
    """Base ``(P,)`` and differences ``(T, P)`` of a list of tensors, and the arithmetic on them.

    Args:
        names: Names of the tensors, in their order.
        base: Where to read the base's tensors.
        tasks: Number of rows.
        dtype: Storage of the differences; by default at least float32.
        widest: Dtype that the base is held in at least: that of the network of which this is a piece.
        storage: How they are kept.

    Attributes:
        storage: How they are kept.
        types: Types of tensors that :meth:`contract` makes in other ones than those of the base.
    """

    def __init__(
        self,
        names: Sequence[str],
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype | None = None,
        widest: torch.dtype | None = None,
        storage: StorageFactory = DenseStorage,
    ) -> None:
        super().__init__()
        layout = layout_of(names, base, widest)
        self._use(storage(layout, base, tasks, dtype or layout.compute_dtype))

    def _use(self, storage: Storage) -> None:
        self.storage, self.layout = storage, storage.layout
        self.names, self.compute_dtype = self.layout.names, self.layout.compute_dtype
        self._columns = self.layout.columns()
        self.types: dict[str, torch.dtype] = {}
        self._contracted: set[WayBack | None] | None = None

    @property
    def device(self) -> torch.device:
        """Where the arithmetic is done."""
        return self.storage.device

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return self.layout.sizes

    def put(self, row: int, name: str, value: Tensor) -> None:
        """Store ``value`` − base; names that are not in the stack are left to others."""
        if name in self._columns:
            self.storage.put(row, self._columns[name], value)

    def base(self) -> dict[str, Tensor]:
        """Tensors of the base, in their own dtypes."""
        return {name: self.base_tensor(name) for name in self.names}

    def base_tensor(self, name: str) -> Tensor:
        """One of these."""
        column = self._columns[name]
        return self._shaped(column, self.storage.base(column))

    def row(self, row: int) -> dict[str, Tensor]:
        """Base + difference number ``row``."""
        return {name: self._shaped(column, self.storage.expert(row, column)) for column, name in enumerate(self.names)}

    def mean(self) -> dict[str, Tensor]:
        """Base + mean difference."""
        return {
            name: self._shaped(column, self.storage.base(column) + self._rows(column).mean(0))
            for column, name in enumerate(self.names)
        }

    def views(self) -> Mapping[str, Tensor]:
        """Differences by name, ``(T, *shape)``; without a copy where they are in memory, else made when asked for."""
        found = _Views(self)
        return dict(found) if self.storage.views else found

    def replaced(self, deltas: Mapping[str, Tensor]) -> Self:
        """Return a stack with the same base and other differences.

        Raises:
            MergeError: A name or a shape differs, or a value is not finite.
        """
        _check_names(deltas, self.names)
        return self._with((name, deltas[name]) for name in self.names)

    def mapped(self, apply: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> Self:
        """Return a stack with the same base and differences that are made of these, one tensor at a time.

        Args:
            apply: Maps ``{name: (T, *shape)}`` to the same names and shapes; it gets the tensors in sorted order.

        Raises:
            MergeError: A name or a shape differs, or a value is not finite.
        """

        def made() -> Iterator[tuple[str, Tensor]]:
            for piece in StackPieces(self):
                found = apply(piece)
                _check_names(found, piece)
                yield from found.items()

        return self._with(made())

    def _with(self, deltas: Iterable[tuple[str, Tensor]]) -> Self:
        def checked() -> Iterator[tuple[int, Tensor]]:
            tasks = self.storage.tasks
            for name, value in deltas:
                column = self._columns[name]
                if value.shape != (expected := (tasks, *self.layout.shapes[column])):
                    raise MergeError(f"transform: {name}: expected shape {expected}, found {tuple(value.shape)}")
                if not torch.isfinite(value).all():
                    raise MergeError(f"transform: {name}: made a value that is not finite")
                yield column, value.reshape(tasks, -1)

        new = type(self).__new__(type(self))
        nn.Module.__init__(new)
        new._use(self.storage.replaced(checked()))
        return new

    @contextmanager
    def contracting_to(self, types: Mapping[str, torch.dtype]) -> Iterator[set[WayBack | None]]:
        """Let :meth:`contract` return some tensors in other types; see :meth:`lit_merge.TaskVectors.contracting_to`.

        Yields:
            The ways back of what is contracted, as it is contracted; ``None`` is that of what has none.

        >>> stack = Stack(["w"], {"w": torch.ones(2)}, 1)
        >>> with stack.contracting_to({"w": torch.bfloat16}):
        ...     stack.contract(torch.zeros(1, 1))["w"].dtype
        torch.bfloat16
        """
        self.types, before = dict(types), self.types
        self._contracted, others = set[WayBack | None](), self._contracted
        try:
            yield self._contracted
        finally:
            self.types, self._contracted = before, others

    def contract(self, coefficients: Tensor, mask: Mask | None = None) -> dict[str, Tensor]:
        """Merge with coefficients ``(T, L)`` and a mask; see :meth:`lit_merge.TaskVectors.contract`."""
        merged = dict(zip(self.names, contract(coefficients, self, mask), strict=True))
        if self._contracted is not None:
            self._contracted |= {getattr(value.grad_fn, "way_back", None) for value in merged.values()}
        return merged

    def combine(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Forward half of :meth:`contract`: one pass over the bank."""
        return tuple(self.merged(column, block, coefficients[:, column]) for column, block in self._walk())

    def inner_products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Backward half of :meth:`contract`: ⟨dL/dθ_l, τ_{t,l}⟩ as ``(T, L)``, one pass over the bank."""
        result = self.no_products()
        for column, block in self._walk(gradients):
            gradient = gradients[column]
            assert gradient is not None
            result[:, column] = self.products(block, gradient)
        return self.storage.total(result)

    def no_products(self) -> Tensor:
        """Return zeros ``(T, L)`` to put inner products into."""
        return torch.zeros(self.storage.tasks, len(self.names), dtype=self.compute_dtype, device=self.device)

    def products(self, block: Block, gradient: Tensor) -> Tensor:
        """Return the inner products ``(T,)`` of one tensor's differences with a gradient ``(*shape)`` of any type."""
        return block.products(gradient.flatten() if block.widens else gradient.flatten().to(self.compute_dtype))

    def combine_masked(self, coefficients: Tensor, mask: Mask) -> tuple[Tensor, ...]:
        """Forward half of :meth:`contract` with a mask: the mask times the offset, one pass over the bank."""
        parts = self.layout.parts
        return tuple(
            self.merged(column, block, coefficients[:, column], mask.recipe, [x[parts[column]] for x in mask.logits])
            for column, block in self._walk()
        )

    def merged(
        self,
        column: int,
        block: Block,
        weights: Tensor,
        recipe: Callable[..., Tensor] | None = None,
        pieces: Sequence[Tensor] = (),
    ) -> Tensor:
        """Merge one tensor.

        Args:
            column: Its number.
            block: Its base and task vectors.
            weights: Its coefficients ``(T,)``.
            recipe: That of the mask, if there is one.
            pieces: The tensor's own piece of each of the mask's logits, ``(n,)``.

        Returns:
            ``(*shape)``, in the dtype of the base or that of :meth:`contracting_to`.
        """
        if recipe is None:
            value = block.merge_as(weights, *self._types(column))
        else:
            value = block.masked(weights, recipe(column, *pieces))
            for dtype in self._types(column):
                value = value.to(dtype)
        return value.reshape(self.layout.shapes[column])

    def masked_gradients(
        self, coefficients: Tensor, mask: Mask, gradients: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Backward half of :meth:`contract` with a mask, which is made again tensor by tensor.

        Args:
            coefficients: ``(T, L)``.
            mask: The mask.
            gradients: dL/dθ_l, ``(*shape)`` each.
            wanted: For the coefficients and for each of the logits, whether its gradient is asked for.

        Returns:
            ⟨dL/dθ_l ⊙ m_l, τ_{t,l}⟩ as ``(T, L)``, and (dL/dθ ⊙ offset) · dm/dx as ``(P,)`` for each of the logits; one
            pass over the bank for each of the two that is wanted.
        """
        products = torch.zeros_like(coefficients) if wanted[0] else None
        slopes = [torch.zeros_like(x) if want else None for x, want in zip(mask.logits, wanted[1:], strict=True)]
        for column, block in self._walk(gradients):
            gradient, part = gradients[column], self.layout.parts[column]
            assert gradient is not None
            flat, pieces = gradient.flatten().to(self.compute_dtype), [x[part] for x in mask.logits]
            product, *found = pulled(block, flat, coefficients[:, column], column, mask.recipe, pieces, wanted)
            if products is not None and product is not None:
                products[:, column] = product
            for slope, value in zip(slopes, found, strict=True):
                if slope is not None and value is not None:
                    slope[part] = value
        return None if products is None else self.storage.total(products), *slopes

    def _walk(self, gradients: Sequence[Tensor | None] | None = None) -> Iterator[tuple[int, Block]]:
        """All tensors, or those that have a gradient."""
        every = range(len(self.names))
        return self.storage.walk(every if gradients is None else [c for c in every if gradients[c] is not None])

    def _rows(self, column: int) -> Tensor:
        return self.storage.rows(column).to(self.compute_dtype)

    def _types(self, column: int) -> tuple[torch.dtype, ...]:
        """Types through which a merged tensor goes: that of the base, and maybe that of autocast."""
        own, other = self.layout.dtypes[column], self.types.get(self.names[column])
        return (own,) if other is None or own == torch.float64 else (own, other)

    def _shaped(self, column: int, flat: Tensor) -> Tensor:
        """Give a merged tensor its dtype and shape."""
        return flat.to(self.layout.dtypes[column]).reshape(self.layout.shapes[column])

    def __len__(self) -> int:
        """Number of values per task."""
        return len(self.layout)


class _Views(Mapping[str, Tensor]):
    """Differences by name, fetched when they are asked for."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def __getitem__(self, name: str) -> Tensor:
        column = self._stack._columns[name]
        rows, shape = self._stack.storage.rows(column), self._stack.layout.shapes[column]
        return rows.unflatten(1, shape) if shape else rows[:, 0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stack.names)

    def __len__(self) -> int:
        return len(self._stack.names)


class StackPieces:
    """A stack tensor by tensor in sorted order of names: what :class:`~lit_merge.transforms.Pieces` says.

    Args:
        stack: The stack.

    Attributes:
        names: Names of its tensors.
    """

    def __init__(self, stack: Stack) -> None:
        self.names = tuple(sorted(stack.names))
        self._stack = stack

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        views = self._stack.views()
        for name in self.names:
            yield {name: views[name]}

    def pairs(self, *, base: bool) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]:
        """Read the stack once, and beside the differences the base, ``(*shape)`` each, if asked."""
        for piece in self:
            yield piece, {name: self._stack.base_tensor(name) for name in piece} if base else None


def _check_names(found: Iterable[str], expected: Iterable[str]) -> None:
    if changed := sorted(set(found) ^ set(expected)):
        raise MergeError(f"transform: changed the names of the tensors: {changed}")
