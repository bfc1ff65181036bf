"""Autograd of :meth:`lit_merge.TaskVectors.contract`: from gradients of merged tensors to those of coefficients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_merge.functional.masked import Mask

if TYPE_CHECKING:
    from lit_merge.stack import Stack

__all__ = ("WayBack", "contract")


def contract(coefficients: Tensor, stack: Stack, mask: Mask | None = None) -> tuple[Tensor, ...]:
    """Return a stack's tensors merged, differentiable with respect to coefficients and the mask's logits.

    Their ``grad_fn`` has a :class:`WayBack`.

    Args:
        coefficients: ``(T, L)``.
        stack: The stack.
        mask: Factors of the entries.
    """
    with torch.autocast(stack.device.type, enabled=False):  # coefficient arithmetic is never in half precision
        if mask is None:
            return _Contract.apply(coefficients, stack)  # type: ignore[no-any-return]
        return _MaskedContract.apply(coefficients, stack, mask.recipe, *mask.logits)  # type: ignore[no-any-return]


class WayBack:
    """The way from gradients of merged tensors to those of what they were contracted from, beside autograd's.

    Autograd hands on gradients of all tensors at once, in the tensors' own types. Here they may come one by one, each
    dropped as soon as it has been used, and in wider types, such as sums over several passes of a network.

    Args:
        stack: What was contracted.
        coefficients: ``(T, L)``, with what they were made of.
        mask: The mask, likewise.

    Attributes:
        inputs: What the gradients are of in the end: coefficients, and the mask's logits.
    """

    def __init__(self, stack: Stack, coefficients: Tensor, mask: Mask | None = None) -> None:
        self.stack, self.mask = stack, mask
        self.inputs = (coefficients, *(() if mask is None else mask.logits))
        self._products: Tensor | None = None

    @property
    def one_by_one(self) -> bool:
        """Whether :meth:`take` may be called: tensors are at hand in any order, on this rank alone."""
        return self.mask is None and self.stack.storage.views

    def take(self, column: int, gradient: Tensor) -> None:
        """Use the gradient of one tensor.

        Args:
            column: Number of the tensor.
            gradient: ``(*shape)``, in any type.
        """
        if self._products is None:
            self._products = self.stack.no_products()
        with torch.no_grad(), torch.autocast(self.stack.device.type, enabled=False):
            block = self.stack.storage.block(column)
            self._products[:, column] += self.stack.products(block, gradient)

    def finish(self, gradients: Mapping[int, Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of :attr:`inputs`.

        Args:
            gradients: Of the tensors that were not taken by number, ``(*shape)`` in any types.
            wanted: For each of the inputs, whether its gradient is asked for.
        """
        given = [gradients.get(column) for column in range(len(self.stack.names))]
        with torch.no_grad(), torch.autocast(self.stack.device.type, enabled=False):
            if self.mask is not None:
                inputs, mask = self.inputs[0].detach(), self.mask.detach()
                return list(self.stack.masked_gradients(inputs, mask, given, wanted))
            taken, self._products = self._products, None
            if taken is not None and not gradients:
                return [taken]
            rest = self.stack.inner_products(given)
            return [rest if taken is None else rest + taken]


class _Contract(torch.autograd.Function):
    """Linear in the coefficients, so nothing but the bank itself is needed for the gradient."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, stack: Stack) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.stack = stack
        ctx.way_back = WayBack(stack, coefficients)  # beside `backward`, for callers that have the gradients
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
        ctx.way_back = WayBack(stack, coefficients, Mask(recipe, logits))
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
