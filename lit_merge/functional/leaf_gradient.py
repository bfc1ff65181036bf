"""Gradients by way of merged weights as leaves: the merge is walked once per step, however many tasks there are.

The tasks' graphs end at leaves that hold the merged weights. Their gradients are added up, and only the sum goes
back through the merge. Chunks of the work free their graphs one after the other, so memory is that of one chunk.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ("Gradients", "Sourced", "WayBack", "accumulate", "leaf_loss", "leaves")


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


class WayBack(Protocol):
    """A way from gradients of merged tensors to what they were made of, beside autograd's.

    The ``grad_fn`` of merged tensors may have one, as ``way_back``; see :meth:`lit_merge.TaskVectors.contract`.
    """

    inputs: tuple[Tensor, ...]

    @property
    def one_by_one(self) -> bool:
        """Whether :meth:`take` may be called."""
        ...

    def take(self, column: int, gradient: Tensor) -> None:
        """Use the gradient of output number ``column``."""
        ...

    def finish(self, gradients: Mapping[int, Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
        """Return the gradients of :attr:`inputs`, given those of the outputs that were not taken, by number."""
        ...


class Gradients:
    """Gradients of leaves, summed over losses: in single precision at least, if there is more than one.

    It is a context, after which the leaves collect gradients as others do.

    Args:
        weights: Leaves as returned by :func:`leaves`.
        start: Sums to begin with, which are changed.

    Attributes:
        sums: By name; a single gradient is in the type of its leaf.
        taken: By name, what uses the sum as soon as it is complete, instead of keeping it.
        last: Whether the loss at hand is known to be the last one.
    """

    def __init__(self, weights: Mapping[str, Tensor], start: Mapping[str, Tensor] | None = None) -> None:
        self.sums: dict[str, Tensor] = dict(start or {})
        self.taken: dict[str, Callable[[Tensor], None]] = {}
        self.last = False
        self._hooks = [
            leaf.register_post_accumulate_grad_hook(partial(self._add, name))
            for name, leaf in weights.items()
            if leaf.requires_grad
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _add(self, name: str, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        if (before := self.sums.pop(name, None)) is not None:
            wide = torch.promote_types(before.dtype, torch.float32)
            gradient = before.to(wide).add_(gradient)
        if self.last and name in self.taken:
            self.taken[name](gradient)
        else:
            self.sums[name] = gradient


class _WithGradient(torch.autograd.Function):
    """A known loss whose gradient with respect to some tensors is known as well, or easy to come by."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, gradients: Callable[[Sequence[bool]], list[Tensor | None]], scale: float, *_: Tensor  # noqa: ANN401
    ) -> Tensor:  # fmt: skip
        ctx.gradients, ctx.scale = gradients, scale
        return loss.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        gradients, ctx.gradients = ctx.gradients(ctx.needs_input_grad[3:]), None
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
    merged: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    losses: Iterable[Tensor],
    scale: float = 1.0,
    count: int | None = None,
) -> Tensor:
    """Return the sum of losses, ready for one ``backward`` through the merge.

    Args:
        merged: Merged weights with their graph, as the rule returns them.
        weights: ``leaves(merged)``, from which the losses are computed.
        losses: Scalars. They are consumed one at a time, and the graph of each is freed before the next is asked for.
        scale: Factor of the losses on the way back to the leaves, for half precision; it does not change the result.
        count: How many losses there are, if it is known: with the last one, gradients of tensors that were contracted
            are used one by one, so that they need not all exist at once.

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
    made = not isinstance(merged, Sourced)
    ways, plain = _ways_back(merged if made else {})
    total: Tensor | None = None
    with Gradients(weights if made else {}) as gradients:
        for way, names in ways:
            if way.one_by_one:
                gradients.taken |= {name: partial(way.take, column) for column, name in names.items()}
        for number, loss in enumerate(losses, 1):
            gradients.last = number == count
            accumulate(loss * scale, weights)
            total = loss.detach() if total is None else total + loss.detach()
    if total is None:
        total = torch.zeros(())
    if isinstance(merged, Sourced) and isinstance(weights, Sourced):
        return _WithGradient.apply(total, lambda _: weights.gradients, scale, *merged.sources)  # type: ignore[no-any-return]

    def found(wanted: Sequence[bool]) -> list[Tensor | None]:
        sums, result, start = gradients.sums, [gradients.sums.pop(name, None) for name in plain], len(plain)
        for way, names in ways:
            asked = wanted[start : start + len(way.inputs)]
            result += way.finish({column: sums.pop(name) for column, name in names.items() if name in sums}, asked)
            start += len(asked)
        return result

    ends = [*(merged[name] for name in plain), *(end for way, _ in ways for end in way.inputs)]
    return _WithGradient.apply(total, found, scale, *ends)  # type: ignore[no-any-return]


def _ways_back(merged: Mapping[str, Tensor]) -> tuple[list[tuple[WayBack, dict[int, str]]], list[str]]:
    """Ways back beside autograd's, each with names of its outputs, and the names of all other tensors."""
    ways: dict[WayBack, dict[int, str]] = {}
    plain = []
    for name, value in merged.items():
        if not value.requires_grad:
            continue
        way: WayBack | None = getattr(value.grad_fn, "way_back", None)
        if way is None or value.output_nr in ways.get(way, {}):
            plain.append(name)
        else:
            ways.setdefault(way, {})[value.output_nr] = name
    return list(ways.items()), plain
