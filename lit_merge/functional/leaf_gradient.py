"""Gradients by way of merged weights as leaves: the merge is walked once per step, however many tasks there are.

The tasks' graphs end at leaves that hold the merged weights. Their gradients are added up, and only the sum goes
back through the merge. Chunks of the work free their graphs one after the other, so memory is that of one chunk.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ("Sourced", "accumulate", "leaf_loss", "leaves")


class Sourced(Mapping[str, Tensor]):
    """Merged weights that are made when they are looked up: not they, but what they are made of collects gradients."""

    @property
    @abstractmethod
    def sources(self) -> list[Tensor]:
        """What the weights are made of, with its graph, as far as it has one."""

    @abstractmethod
    def leaves(self) -> Self:
        """Cut from the graph: the same weights, made of leaves."""

    @property
    @abstractmethod
    def inputs(self) -> list[Tensor]:
        """Of :meth:`leaves`: the leaves that collect gradients."""

    @property
    @abstractmethod
    def gradients(self) -> list[Tensor | None]:
        """Of :meth:`leaves`: what was collected for each of the :attr:`sources`."""


class _WithGradient(torch.autograd.Function):
    """A known loss whose gradient with respect to the merged tensors is known as well."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor | None], scale: float, *_: Tensor) -> Tensor:  # noqa: ANN401
        ctx.gradients, ctx.scale = gradients, scale
        return loss.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradients, ctx.gradients = ctx.gradients, None
        grad = grad / ctx.scale
        return (None, None, None, *(g if g is None else g.mul_(grad.to(g.dtype)) for g in gradients))


def leaves(merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut the merged weights from their graph; those that have one become leaves that collect a gradient.

    Args:
        merged: Merged weights. Of lazy ones, what they are made of becomes the leaves.

    Returns:
        The same values, sharing memory.
    """
    if isinstance(merged, Sourced):
        return cast("dict[str, Tensor]", merged.leaves())
    return {name: value.detach().requires_grad_(value.requires_grad) for name, value in merged.items()}


def accumulate(loss: Tensor, weights: Mapping[str, Tensor]) -> None:
    """Add the gradient of ``loss`` to ``weights`` and free the graph of ``loss``.

    Args:
        loss: Scalar.
        weights: Leaves as returned by :func:`leaves`.
    """
    if isinstance(weights, Sourced):
        inputs = weights.inputs
    else:
        inputs = [value for value in weights.values() if value.requires_grad]
    if inputs and loss.requires_grad:
        loss.backward(inputs=inputs)


def leaf_loss(
    merged: Mapping[str, Tensor], weights: Mapping[str, Tensor], losses: Iterable[Tensor], scale: float = 1.0
) -> Tensor:
    """Return the sum of losses, ready for one ``backward`` through the merge.

    Args:
        merged: Merged weights with their graph, as the rule returns them.
        weights: ``leaves(merged)``, from which the losses are computed.
        losses: Scalars. They are consumed one at a time, and the graph of each is freed before the next is asked for.
        scale: Factor of the losses on the way back to the leaves, for half precision; it does not change the result.

    Returns:
        Scalar: its value is the sum of the losses, its gradient that of the sum.

    >>> import torch
    >>> coefficient = torch.tensor(2.0, requires_grad=True)
    >>> merged = {"w": coefficient * torch.tensor([1.0, 3.0])}
    >>> w = leaves(merged)
    >>> loss = leaf_loss(merged, w, (w["w"][i] ** 2 for i in range(2)))
    >>> loss.backward()
    >>> loss.item(), coefficient.grad.item()
    (40.0, 40.0)
    """
    total: Tensor | None = None
    for loss in losses:
        accumulate(loss * scale, weights)
        total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        total = torch.zeros(())
    if isinstance(merged, Sourced) and isinstance(weights, Sourced):
        return _WithGradient.apply(total, weights.gradients, scale, *merged.sources)  # type: ignore[no-any-return]
    live = [name for name, value in merged.items() if value.requires_grad]
    gradients = [weights[name].grad for name in live]
    return _WithGradient.apply(total, gradients, scale, *(merged[name] for name in live))  # type: ignore[no-any-return]
