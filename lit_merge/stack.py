"""Storage of the bank: one contiguous row per task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_merge.errors import MergeError

__all__ = ("Stack",)


class Stack(nn.Module):
    """Base ``(P,)`` and differences ``(T, P)`` of a list of tensors, as two non-persistent buffers.

    The base is held in the widest dtype of its tensors, so that every one comes back exactly.

    Args:
        names: Names of the tensors, in their order.
        base: Where to read the base's tensors.
        tasks: Number of rows.
        dtype: Storage of the differences; by default at least float32.
    """

    _base: Tensor
    _deltas: Tensor

    def __init__(
        self, names: Sequence[str], base: Mapping[str, Tensor], tasks: int, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self._layout: dict[str, tuple[slice, torch.Size, torch.dtype]] = {}
        wide, start = torch.float32 if not names else base[names[0]].dtype, 0
        for name in self.names:
            value = base[name]
            self._layout[name] = (slice(start, start := start + value.numel()), value.shape, value.dtype)
            wide = torch.promote_types(wide, value.dtype)
        self.compute_dtype = torch.promote_types(wide, torch.float32)
        device = base[names[0]].device if names else torch.device("cpu")
        self.register_buffer("_base", torch.empty(start, dtype=wide, device=device), persistent=False)
        store = dtype or self.compute_dtype
        self.register_buffer("_deltas", torch.zeros(tasks, start, dtype=store, device=device), persistent=False)
        for name, (part, _, _) in self._layout.items():
            self._base[part] = base[name].detach().flatten().to(wide)

    @property
    def device(self) -> torch.device:
        """Where the bank is."""
        return self._base.device

    def put(self, row: int, name: str, value: Tensor) -> None:
        """Store ``value`` − base; names that are not in the stack are left to others."""
        if name in self._layout:
            part = self._layout[name][0]
            difference = value.detach().flatten().to(self._base.device, self.compute_dtype) - self._base[part]
            self._deltas[row, part] = difference.to(self._deltas.dtype)

    def base(self) -> dict[str, Tensor]:
        """Tensors of the base, in their own dtypes."""
        return self._unflatten(self._base)

    def row(self, row: int) -> dict[str, Tensor]:
        """Base + difference number ``row``."""
        return self._unflatten(self._base + self._deltas[row].to(self.compute_dtype))

    def mean(self) -> dict[str, Tensor]:
        """Base + mean difference."""
        return self._unflatten(self._base + self._deltas.to(self.compute_dtype).mean(0))

    def views(self) -> dict[str, Tensor]:
        """Differences by name, ``(T, *shape)``, without a copy."""
        return {name: self._deltas[:, part].unflatten(1, shape) if shape else self._deltas[:, part.start]
                for name, (part, shape, _) in self._layout.items()}  # fmt: skip

    def replaced(self, deltas: Mapping[str, Tensor]) -> Self:
        """Return a stack with the same base and other differences.

        Raises:
            MergeError: A name or a shape differs, or a value is not finite.
        """
        if set(deltas) != set(self.names):
            raise MergeError(f"transform: changed the names of the tensors: {sorted(set(deltas) ^ set(self.names))}")
        new = type(self)((), {}, 0)
        new.names, new._layout, new.compute_dtype = self.names, self._layout, self.compute_dtype
        new._base, new._deltas = self._base, torch.empty_like(self._deltas)
        for name, old in self.views().items():
            if deltas[name].shape != old.shape:
                raise MergeError(
                    f"transform: {name}: expected shape {tuple(old.shape)}, found {tuple(deltas[name].shape)}"
                )
            if not torch.isfinite(deltas[name]).all():
                raise MergeError(f"transform: {name}: made a value that is not finite")
            new._deltas[:, self._layout[name][0]] = deltas[name].reshape(len(old), -1).to(self._deltas.dtype)
        return new

    def contract(self, coefficients: Tensor) -> dict[str, Tensor]:
        """Merge with coefficients ``(T, L)``; see :meth:`lit_merge.TaskVectors.contract`."""
        with torch.autocast(self.device.type, enabled=False):  # coefficient arithmetic is never in half precision
            return dict(zip(self.names, _Contract.apply(coefficients, self), strict=True))

    def combine(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Forward half of :meth:`contract`: one pass over the bank."""
        merged = []
        for column, (part, shape, dtype) in enumerate(self._layout.values()):
            rows = self._deltas[:, part].to(self.compute_dtype)
            value = torch.addmv(self._base[part].to(self.compute_dtype), rows.T, coefficients[:, column])
            merged.append(value.to(dtype).reshape(shape))
        return tuple(merged)

    def inner_products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Backward half of :meth:`contract`: ⟨dL/dθ_l, τ_{t,l}⟩ as ``(T, L)``, one pass over the bank."""
        result = self._deltas.new_zeros(len(self._deltas), len(self.names), dtype=self.compute_dtype)
        for column, (gradient, (part, _, _)) in enumerate(zip(gradients, self._layout.values(), strict=True)):
            if gradient is not None:
                rows = self._deltas[:, part].to(self.compute_dtype)
                result[:, column] = torch.mv(rows, gradient.flatten().to(self.compute_dtype))
        return result

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: flat[part].to(dtype).reshape(shape) for name, (part, shape, dtype) in self._layout.items()}

    def __len__(self) -> int:
        """Number of values per task."""
        return math.prod(self._base.shape)


class _Contract(torch.autograd.Function):
    """Linear in the coefficients, so nothing but the bank itself is needed for the gradient."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, stack: Stack) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.stack = stack
        ctx.set_materialize_grads(False)
        return stack.combine(coefficients)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:  # noqa: ANN401
        with torch.autocast(ctx.stack.device.type, enabled=False):
            return ctx.stack.inner_products(gradients), None
