"""Storage of the bank: one contiguous row per task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_merge.errors import MergeError
from lit_merge.functional.masked import Mask

__all__ = ("Stack",)


class Stack(nn.Module):
    """Base ``(P,)`` and differences ``(T, P)`` of a list of tensors, as two non-persistent buffers.

    The base is held in the widest dtype of its tensors, so that every one comes back exactly.

    Args:
        names: Names of the tensors, in their order.
        base: Where to read the base's tensors.
        tasks: Number of rows.
        dtype: Storage of the differences; by default at least float32.
        widest: Dtype that the base is held in at least: that of the network of which this is a piece.
    """

    _base: Tensor
    _deltas: Tensor

    def __init__(
        self,
        names: Sequence[str],
        base: Mapping[str, Tensor],
        tasks: int,
        dtype: torch.dtype | None = None,
        widest: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self._layout: dict[str, tuple[slice, torch.Size, torch.dtype]] = {}
        wide, start = torch.float32 if not names else base[names[0]].dtype, 0
        wide = wide if widest is None else torch.promote_types(wide, widest)
        for name in self.names:
            value = base[name]
            self._layout[name] = (slice(start, start := start + value.numel()), value.shape, value.dtype)
            wide = torch.promote_types(wide, value.dtype)
        self.compute_dtype = torch.promote_types(wide, torch.float32)
        device = base[names[0]].device if names else torch.device("cpu")
        self.register_buffer("_base", torch.empty(start, dtype=wide, device=device), persistent=False)
        store = dtype or self.compute_dtype
        self.register_buffer("_deltas", _zeros(tasks, start, store, device), persistent=False)
        for name, (part, _, _) in self._layout.items():
            self._base[part] = base[name].detach().flatten().to(wide)

    @property
    def device(self) -> torch.device:
        """Where the bank is."""
        return self._base.device

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(part.stop - part.start for part, _, _ in self._layout.values())

    def put(self, row: int, name: str, value: Tensor) -> None:
        """Store ``value`` − base; names that are not in the stack are left to others."""
        if name in self._layout:
            part = self._layout[name][0]
            wide = value.detach().flatten().to(self._base.device, self.compute_dtype)
            base = self._base[part]
            self._deltas[row, part] = wide.sub_(base) if wide.dtype != value.dtype else wide - base  # a copy is ours

    def base(self) -> dict[str, Tensor]:
        """Tensors of the base, in their own dtypes."""
        return self._unflatten(self._base)

    def row(self, row: int) -> dict[str, Tensor]:
        """Base + difference number ``row``."""
        return self._unflatten(self._base + self._deltas[row].to(self.compute_dtype))

    def mean(self) -> dict[str, Tensor]:
        """Base + mean difference."""
        return {name: (self._base[part] + self._rows(part).mean(0)).to(dtype).reshape(shape)
                for name, (part, shape, dtype) in self._layout.items()}  # fmt: skip

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
        new._base, new._deltas = self._base, _zeros(len(self._deltas), len(self), self._deltas.dtype, self.device)
        for name, old in self.views().items():
            if deltas[name].shape != old.shape:
                raise MergeError(
                    f"transform: {name}: expected shape {tuple(old.shape)}, found {tuple(deltas[name].shape)}"
                )
            if not torch.isfinite(deltas[name]).all():
                raise MergeError(f"transform: {name}: made a value that is not finite")
            new._deltas[:, self._layout[name][0]] = deltas[name].reshape(len(old), -1).to(self._deltas.dtype)
        return new

    def contract(self, coefficients: Tensor, mask: Mask | None = None) -> dict[str, Tensor]:
        """Merge with coefficients ``(T, L)`` and a mask; see :meth:`lit_merge.TaskVectors.contract`."""
        with torch.autocast(self.device.type, enabled=False):  # coefficient arithmetic is never in half precision
            if mask is None:
                return dict(zip(self.names, _Contract.apply(coefficients, self), strict=True))
            merged = _MaskedContract.apply(coefficients, self, mask.recipe, *mask.logits)
            return dict(zip(self.names, merged, strict=True))

    def combine(self, coefficients: Tensor) -> tuple[Tensor, ...]:
        """Forward half of :meth:`contract`: one pass over the bank."""
        merged = []
        for column, (part, shape, dtype) in enumerate(self._layout.values()):
            value = torch.addmv(self._base[part].to(self.compute_dtype), self._rows(part).T, coefficients[:, column])
            merged.append(value.to(dtype).reshape(shape))
        return tuple(merged)

    def inner_products(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """Backward half of :meth:`contract`: ⟨dL/dθ_l, τ_{t,l}⟩ as ``(T, L)``, one pass over the bank."""
        result = self._deltas.new_zeros(len(self._deltas), len(self.names), dtype=self.compute_dtype)
        for column, (gradient, (part, _, _)) in enumerate(zip(gradients, self._layout.values(), strict=True)):
            if gradient is not None:
                result[:, column] = torch.mv(self._rows(part), gradient.flatten().to(self.compute_dtype))
        return result

    def combine_masked(self, coefficients: Tensor, mask: Mask) -> tuple[Tensor, ...]:
        """Forward half of :meth:`contract` with a mask: the mask times the offset, one pass over the bank."""
        merged = []
        for column, (part, shape, dtype) in enumerate(self._layout.values()):
            factor = mask.recipe(column, *(x[part] for x in mask.logits))
            offset = self._rows(part).T.mv(coefficients[:, column])
            value = torch.addcmul(self._base[part].to(self.compute_dtype), factor, offset)
            merged.append(value.to(dtype).reshape(shape))
        return tuple(merged)

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
        for column, (gradient, (part, _, _)) in enumerate(zip(gradients, self._layout.values(), strict=True)):
            if gradient is None:
                continue
            gradient = gradient.flatten().to(self.compute_dtype)
            with torch.enable_grad():
                pieces = [
                    x.detach()[part].requires_grad_(s is not None) for x, s in zip(mask.logits, slopes, strict=True)
                ]
                factor = mask.recipe(column, *pieces)
            if products is not None:
                products[:, column] = self._rows(part).mv(gradient * factor.detach())
            if factor.requires_grad:
                outer = gradient * self._rows(part).T.mv(coefficients[:, column])
                asked = [(x, s) for x, s in zip(pieces, slopes, strict=True) if s is not None]
                found = torch.autograd.grad(factor, [x for x, _ in asked], outer, allow_unused=True)
                for (_, slope), value in zip(asked, found, strict=True):
                    if value is not None:
                        slope[part] = value
        return products, *slopes

    def _rows(self, part: slice) -> Tensor:
        return self._deltas[:, part].to(self.compute_dtype)

    def _unflatten(self, flat: Tensor) -> dict[str, Tensor]:
        return {name: flat[part].to(dtype).reshape(shape) for name, (part, shape, dtype) in self._layout.items()}

    def __len__(self) -> int:
        """Number of values per task."""
        return math.prod(self._base.shape)


def _zeros(tasks: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros ``(T, P)``; a single column has the stride of one of many, as that decides on the order of sums over T."""
    return torch.zeros(tasks, max(size, 2), dtype=dtype, device=device)[:, :size]


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


class _MaskedContract(torch.autograd.Function):
    """Saves coefficients and logits only: mask and offset are cheaper to make again than to keep."""

    @staticmethod
    def forward(
        ctx: Any, coefficients: Tensor, stack: Stack, recipe: Callable[..., Tensor], *logits: Tensor  # noqa: ANN401
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.stack, ctx.recipe = stack, recipe
        ctx.save_for_backward(coefficients, *logits)
        ctx.set_materialize_grads(False)
        return stack.combine_masked(coefficients, Mask(recipe, logits))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        coefficients, *logits = ctx.saved_tensors
        wanted = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        mask = Mask(ctx.recipe, tuple(logits))
        with torch.autocast(ctx.stack.device.type, enabled=False):
            products, *slopes = ctx.stack.masked_gradients(coefficients, mask, gradients, wanted)
        return products, None, None, *slopes
