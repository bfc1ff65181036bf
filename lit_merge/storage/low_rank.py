"""LowRankStorage: matrices among the task vectors as truncated factors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from lit_merge.errors import MergeError
from lit_merge.functional.decompositions import truncated_svd
from lit_merge.storage.base import Block, Layout, Storage
from lit_merge.storage.dense import DenseBlock, difference, zero_rows

__all__ = ("LowRankBlock", "LowRankStorage", "check_rank")


class LowRankStorage(Storage):
    """Task vectors of matrices by their leading singular directions, τ_t ≈ (U_t S_t) V_tᵀ; everything else as it is.

    All tasks of a matrix ``(m, n)`` are one product: with ``A = [U_1 S_1 … U_T S_T]`` ``(m, T k)`` and
    ``B = [V_1ᵀ; …; V_Tᵀ]`` ``(T k, n)`` the merge is θ0 + (A Λ) B, and the gradients of the coefficients are the sums
    over k of the diagonal of ``Aᵀ G Bᵀ``, of which only the sums over one side are made: no task vector is put
    together. Tensors of more than two dimensions are flattened from the second on. Where factors would not take less
    than the matrix, it is kept as it is, so that a share of 1 loses nothing.

    A share of a quarter halves the bytes of square matrices, and takes 31 % of those of ``(m, 4 m)``. Task vectors
    of fine-tuned transformers are far from full rank: with a tenth of their directions the experts keep 99 % of their
    accuracy (Gargiulo et al., Task Singular Vectors, arXiv 2412.00081, section 4). Sparse task vectors are not: what
    is lost is measured (:meth:`report`), not assumed.

    Args:
        layout: See :class:`~lit_merge.storage.base.Storage`.
        base: See there.
        tasks: See there.
        dtype: Storage of the factors.
        device: Where it is until the module is moved; by default where the base is.
        rank: Directions k of each matrix and task: a number of them, or a share of min(m, n) in (0, 1].

    Raises:
        MergeError: ``rank`` is neither.

    >>> from lit_merge.storage.base import layout_of
    >>> base = {"w": torch.zeros(3, 4)}
    >>> storage = LowRankStorage(layout_of(["w"], base), base, 1, torch.float32, rank=1)
    >>> storage.put(0, 0, torch.ones(3, 1) * torch.tensor([1.0, 2.0, 0.0, 0.0]))
    >>> storage.block(0).merge(torch.tensor([0.5])).view(3, 4)[0]
    tensor([0.5000, 1.0000, 0.0000, 0.0000])
    >>> storage.report()["relative_error"] < 1e-6, storage.report()["bytes"], storage.report()["dense_bytes"]
    (True, 28, 48)
    """

    _base: Tensor
    _rows: Tensor

    def __init__(
        self,
        layout: Layout,
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype,
        device: torch.device | None = None,
        rank: int | float = 0.25,
    ) -> None:
        super().__init__(layout, base, tasks, dtype)
        self.rank = check_rank(rank)
        self._before: list[float] = []
        place = device or (base[layout.names[0]].device if layout.names else torch.device("cpu"))
        flat = torch.empty(len(layout), dtype=layout.wide, device=place)
        for name, part in zip(layout.names, layout.parts, strict=True):
            flat[part] = base[name].detach().flatten().to(flat)
        self._make(flat)

    def _make(self, base: Tensor) -> None:
        """Make zeros on the device of the base."""
        self.register_buffer("_base", base, persistent=False)
        self._ranks = tuple(_directions(shape, self.rank) for shape in self.layout.shapes)
        self._places: list[slice] = []
        start = 0
        for column, (shape, k) in enumerate(zip(self.layout.shapes, self._ranks, strict=True)):
            own = 0 if k else shape.numel()
            self._places.append(slice(start, start := start + own))
            if k:
                m, n = _matrix(shape)
                self.register_buffer(
                    f"_left_{column}", base.new_zeros(m, self.tasks * k, dtype=self.dtype), persistent=False
                )
                self.register_buffer(
                    f"_right_{column}", base.new_zeros(self.tasks * k, n, dtype=self.dtype), persistent=False
                )
        self.register_buffer("_rows", zero_rows(self.tasks, start, self.dtype, base.device), persistent=False)
        size = (self.tasks, len(self.layout.names))
        self._lengths, self._lost = (torch.zeros(size, dtype=torch.float64, device="cpu") for _ in range(2))

    @property
    @override
    def device(self) -> torch.device:
        return self._base.device

    @property
    @override
    def lazy(self) -> bool:
        return True

    @override
    def put(self, row: int, column: int, value: Tensor) -> None:
        self._keep(row, column, difference(value, self.base(column), self.layout.compute_dtype))

    def _keep(self, row: int, column: int, delta: Tensor) -> None:
        """Store a task vector ``(n,)`` in the compute dtype, and measure what is lost."""
        if k := self._ranks[column]:
            left, right = self._factors(column)
            own = slice(row * k, (row + 1) * k)
            u, s, vh = truncated_svd(delta.reshape(len(left), -1), k)
            left[:, own], right[own] = u * s, vh
        else:
            self._rows[row, self._places[column]] = delta
        self._lengths[row, column] = torch.linalg.vector_norm(delta, dtype=torch.float64)
        self._lost[row, column] = torch.linalg.vector_norm(delta - self._dense(row, column), dtype=torch.float64)

    @override
    def block(self, column: int) -> Block:
        base, dtype = self.base(column), self.layout.compute_dtype
        if not self._ranks[column]:
            return DenseBlock(base, self._rows[:, self._places[column]], dtype)
        return LowRankBlock(base, *self._factors(column), self.tasks, dtype)

    @override
    def base(self, column: int) -> Tensor:
        return self._base[self.layout.parts[column]]

    @override
    def rows(self, column: int) -> Tensor:
        if not self._ranks[column]:
            return self._rows[:, self._places[column]]
        return torch.stack([self.row(row, column) for row in range(self.tasks)])

    @override
    def row(self, row: int, column: int) -> Tensor:
        return self._dense(row, column).to(self.dtype)

    def _dense(self, row: int, column: int) -> Tensor:
        """One task vector put together again, ``(n,)`` in the compute dtype."""
        dtype = self.layout.compute_dtype
        if not (k := self._ranks[column]):
            return self._rows[row, self._places[column]].to(dtype)
        left, right = self._factors(column)
        own = slice(row * k, (row + 1) * k)
        return (left[:, own].to(dtype) @ right[own].to(dtype)).flatten()

    def _factors(self, column: int) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"_left_{column}"), self.get_buffer(f"_right_{column}")

    @override
    def replaced(self, deltas: Iterable[tuple[int, Tensor]]) -> Self:
        new = type(self).__new__(type(self))
        Storage.__init__(new, self.layout, {}, self.tasks, self.dtype)
        new.rank, new._before = self.rank, [*self._before, _ratio(self._lost, self._lengths)]
        new._make(self._base)
        for column, value in deltas:
            for row, delta in enumerate(value):
                new._keep(row, column, delta.to(self.device, self.layout.compute_dtype))
        return new

    @override
    def report(self) -> dict[str, object]:
        """Return what was lost.

        ``relative_error`` is ‖τ − kept‖ / ‖τ‖ in the Frobenius norm, over all task vectors; ``tasks`` has it for each
        task, ``worst`` for the tensor in which it is the largest over its tasks. Rounding to ``dtype`` is part of it.
        ``bytes`` are those of the task vectors, ``dense_bytes`` what a dense storage would take. If task vectors were
        transformed after they had been truncated, ``before_transforms`` has the errors of the earlier truncations.
        """
        found: dict[str, object] = {
            "kind": "low_rank",
            "rank": self.rank,
            "bytes": sum(value.nbytes for value in self.buffers()) - self._base.nbytes,
            "dense_bytes": self.tasks * len(self.layout) * self.dtype.itemsize,
            "relative_error": _ratio(self._lost, self._lengths),
            "tasks": [_ratio(*pair) for pair in zip(self._lost, self._lengths, strict=True)],
        }
        each = [_ratio(*pair) for pair in zip(self._lost.T, self._lengths.T, strict=True)]
        if each:
            worst = max(range(len(each)), key=each.__getitem__)
            found["worst"] = {"tensor": self.layout.names[worst], "relative_error": each[worst]}
        if self._before:
            found["before_transforms"] = self._before
        return found


class LowRankBlock(Block):
    """One matrix of the bank as factors.

    Args:
        base: ``(m n,)``.
        left: ``(m, T k)``, in the dtype of the storage.
        right: ``(T k, n)``, likewise.
        tasks: T.
        dtype: Dtype of the arithmetic.
    """

    def __init__(self, base: Tensor, left: Tensor, right: Tensor, tasks: int, dtype: torch.dtype) -> None:
        self._base, self._left, self._right = base, left, right
        self._tasks, self._dtype = tasks, dtype

    @override
    def merge(self, weights: Tensor) -> Tensor:
        base = self.base().view(len(self._left), -1)
        return torch.addmm(base, *self._weighted(weights)).flatten()

    @override
    def offset(self, weights: Tensor) -> Tensor:
        left, right = self._weighted(weights)
        return (left @ right).flatten()

    @override
    def products(self, vector: Tensor) -> Tensor:
        matrix, left, right = vector.view(len(self._left), -1), self._left.to(self._dtype), self._right.to(self._dtype)
        if len(matrix) <= matrix.shape[1]:
            each = (matrix @ right.T).mul_(left).sum(0)
        else:
            each = (left.T @ matrix).mul_(right).sum(1)
        return each.view(self._tasks, -1).sum(1)

    @override
    def base(self) -> Tensor:
        return self._base.to(self._dtype)

    def _weighted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Factors in the dtype of the arithmetic, the smaller one times the weights."""
        left, right = self._left.to(self._dtype), self._right.to(self._dtype)
        each = weights.repeat_interleave(len(right) // self._tasks)
        return (left * each, right) if left.numel() <= right.numel() else (left, each.unsqueeze(1) * right)


def check_rank(rank: int | float) -> int | float:
    """Return a rank if it is one.

    Raises:
        MergeError: It is neither a number of directions nor a share of them.
    """
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole and not (isinstance(rank, float) and 0 < rank <= 1):
        raise MergeError(
            f"storage_rank: expected a number of directions, 1 or more, or a share of them in (0, 1] such as 0.25, "
            f"found {rank!r}"
        )
    return rank


def _matrix(shape: Iterable[int]) -> tuple[int, int]:
    m, *rest = shape
    return m, math.prod(rest)


def _directions(shape: torch.Size, rank: int | float) -> int:
    """How many to keep; 0: the tensor stays as it is."""
    if len(shape) < 2 or 0 in shape:
        return 0
    m, n = _matrix(shape)
    k = min(rank, m, n) if isinstance(rank, int) else max(1, round(rank * min(m, n)))
    return k if k * (m + n) < m * n else 0


def _ratio(lost: Tensor, lengths: Tensor) -> float:
    """Relative length of what was lost in several tensors; nothing was lost of nothing."""
    whole = float(lengths.square().sum().sqrt())
    return float(lost.square().sum().sqrt()) / whole if whole else 0.0
