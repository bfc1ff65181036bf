"""Merged weights that are made when they are asked for, and whose gradients go straight to what they are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override

from lit_merge.functional.leaf_gradient import Sourced
from lit_merge.functional.masked import Mask, pulled
from lit_merge.stack import Stack

__all__ = ("LazyWeights", "detached")


class LazyWeights(Sourced):
    """A recipe of merged weights: the bank, coefficients and a mask; and tensors that are given as they are.

    :meth:`lit_merge.TaskVectors.lazily` makes one. To look a tensor up is to merge it, anew each time, with autograd.
    Nothing but coefficients and logits is held, so merged weights live as long as the one who asked for them lets them.

    Args:
        stack: The bank's tensors.
        coefficients: ``(T, L)``.
        mask: Factors of the entries, from logits ``(P,)``.
        given: Further tensors by name; they go before merged ones.
        aliases: Second names, ``{alias: name}``.

    >>> from lit_merge import TaskVectors
    >>> bank = TaskVectors.from_state_dicts({"w": torch.zeros(2)}, {"a": {"w": torch.ones(2)}})
    >>> with bank.lazily():
    ...     weights = bank.contract(0.25)
    >>> type(weights).__name__, weights["w"]
    ('LazyWeights', tensor([0.2500, 0.2500]))
    """

    def __init__(
        self,
        stack: Stack,
        coefficients: Tensor,
        mask: Mask | None = None,
        given: Mapping[str, Tensor] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self._stack, self._coefficients, self._mask = stack, coefficients, mask
        self._given, self._aliases = dict(given or {}), dict(aliases or {})
        self._columns = stack.layout.columns()
        self._ends: _Ends | None = None

    # A mapping ---------------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors([name])[name]

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._columns, *self._given, *self._aliases])

    def __contains__(self, name: object) -> bool:  # not by merging it
        return name in self._columns or name in self._given or name in self._aliases

    def __len__(self) -> int:
        return len({*self._columns, *self._given, *self._aliases})

    def __or__(self, given: Mapping[str, Tensor]) -> Self:
        return self.with_tensors(given)

    def with_tensors(self, given: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None) -> Self:
        """Return the same with further tensors and second names.

        Args:
            given: Tensors by name; they go before what is there.
            aliases: Second names, ``{alias: name}``; they go before all.
        """
        left = {alias: name for alias, name in self._aliases.items() if alias not in given}
        every = {name: value for name, value in self._given.items() if name not in (aliases or {})} | dict(given)
        return self._like(self._coefficients, self._mask, every, left | dict(aliases or {}), self._ends)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Merge some tensors, in one pass over their part of the bank; tied ones once.

        Args:
            names: Names, in any order.

        Raises:
            KeyError: There is no such tensor.
        """
        first = {name: self._aliases.get(name, name) for name in names}
        columns = sorted({self._columns[name] for name in first.values() if name not in self._given})
        made = dict(zip(columns, self._merge(columns), strict=True))
        return {
            name: self._given[own] if own in self._given else made[self._columns[own]] for name, own in first.items()
        }

    def _merge(self, columns: Sequence[int]) -> Sequence[Tensor]:
        if not columns:
            return ()
        recipe = None if self._mask is None else self._mask.recipe
        points = [point for column in columns for point in self._points(column)]
        with torch.autocast(self._stack.device.type, enabled=False):  # coefficients are never in half precision
            merged: tuple[Tensor, ...] = _Merge.apply(self._stack, recipe, columns, *points)
        return merged

    def _points(self, column: int) -> Sequence[Tensor]:
        """What a tensor is made of: coefficients ``(T,)``, and its piece of each of the logits, ``(n,)``."""
        if self._ends is not None:
            return self._ends.points[column]
        part = self._stack.layout.parts[column]
        logits = () if self._mask is None else self._mask.logits
        return self._coefficients[:, column], *(x[part] for x in logits)

    # Gradients ---------------------------------------------------------------------------------------------------

    @property
    @override
    def sources(self) -> list[Tensor]:
        logits = () if self._mask is None else self._mask.logits
        return [value for value in (self._coefficients, *logits, *self._given.values()) if value.requires_grad]

    @override
    def leaves(self) -> Self:
        given = {name: value.detach().requires_grad_(value.requires_grad) for name, value in self._given.items()}
        ends = _Ends(self._stack, self._coefficients, () if self._mask is None else self._mask.logits)
        return self._like(self._coefficients, self._mask, given, self._aliases, ends)

    @property
    @override
    def inputs(self) -> list[Tensor]:
        collected = [] if self._ends is None else self._ends.inputs
        return collected + [value for value in self._given.values() if value.requires_grad]

    @property
    @override
    def gradients(self) -> list[Tensor | None]:
        collected: list[Tensor | None] = [] if self._ends is None else [*self._ends.gradients]
        return collected + [value.grad for value in self._given.values() if value.requires_grad]

    def detach(self) -> Self:
        """Return the same weights as constants."""
        mask = None if self._mask is None else self._mask.detach()
        given = {name: value.detach() for name, value in self._given.items()}
        return self._like(self._coefficients.detach(), mask, given, self._aliases, None)

    def _like(
        self,
        coefficients: Tensor,
        mask: Mask | None,
        given: Mapping[str, Tensor],
        aliases: Mapping[str, str],
        ends: _Ends | None,
    ) -> Self:
        new = type(self)(self._stack, coefficients, mask, given, aliases)
        new._ends = ends
        return new


def detached(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a state dict of constants; a lazy one stays lazy."""
    return state.detach() if isinstance(state, LazyWeights) else {name: value.detach() for name, value in state.items()}


class _Ends:
    """Leaves for the sources of each tensor, whose gradients are parts of one gradient per source.

    So a piece's gradient is added where it belongs: no gradient of the size of all logits is made for one tensor.

    Args:
        stack: Says which part of the logits is a tensor's.
        coefficients: ``(T, L)``.
        logits: ``(P,)`` each.
    """

    def __init__(self, stack: Stack, coefficients: Tensor, logits: Sequence[Tensor]) -> None:
        # a row per tensor, so that a piece is contiguous
        sources = [coefficients.detach().T.contiguous().requires_grad_(coefficients.requires_grad), *logits]
        self._collected = [torch.zeros_like(source) if source.requires_grad else None for source in sources]
        self.points: list[tuple[Tensor, ...]] = []
        for column, part in enumerate(stack.layout.parts):
            ends = []
            for number, (source, gradient) in enumerate(zip(sources, self._collected, strict=True)):
                place = part if number else column
                ends.append(end := source.detach()[place])
                if gradient is not None:
                    end.requires_grad_().grad = gradient[place]  # autograd adds to it in place
            self.points.append(tuple(ends))
        self.inputs = [point for points in self.points for point in points if point.requires_grad]

    @property
    def gradients(self) -> list[Tensor]:
        """Of those of coefficients ``(T, L)`` and logits ``(P,)`` that have one."""
        first, *others = self._collected
        own = [] if first is None else [first.T.contiguous()]
        return own + [gradient for gradient in others if gradient is not None]


class _Merge(torch.autograd.Function):
    """Merges some tensors; keeps what they are made of, and neither mask nor offset."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, recipe: Any, columns: Sequence[int], *points: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.stack, ctx.recipe, ctx.columns = stack, recipe, columns
        ctx.save_for_backward(*points)
        ctx.set_materialize_grads(False)
        of = dict(zip(columns, _parted(points, len(columns)), strict=True))
        return tuple(
            stack.merged(column, block, of[column][0], recipe, of[column][1:])
            for column, block in stack.storage.walk(columns)
        )

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        stack, recipe, columns, count = ctx.stack, ctx.recipe, ctx.columns, len(ctx.columns)
        of = dict(zip(columns, _parted(ctx.saved_tensors, count), strict=True))
        wanted = dict(zip(columns, _parted(ctx.needs_input_grad[3:], count), strict=True))
        given = dict(zip(columns, gradients, strict=True))
        found: dict[int, Sequence[Tensor | None]] = {column: [None] * len(of[column]) for column in columns}
        with torch.autocast(stack.device.type, enabled=False):
            for column, block in stack.storage.walk([c for c in columns if given[c] is not None]):
                weights, *pieces = of[column]
                flat = given[column].flatten().to(stack.compute_dtype)
                found[column] = pulled(block, flat, weights, column, recipe, pieces, wanted[column])
            own = {column: values[0] for column, values in found.items() if values[0] is not None}
            if own:
                sums = stack.storage.total(torch.stack(list(own.values()), 1)).unbind(1)  # ranks may share the bank
                found |= {c: [value, *found[c][1:]] for c, value in zip(own, sums, strict=True)}
        return (None, None, None, *(value for column in columns for value in found[column]))


def _parted(values: Sequence[Any], count: int) -> list[Sequence[Any]]:
    """Cut into ``count`` parts of one length."""
    size = len(values) // count
    return [values[k * size : (k + 1) * size] for k in range(count)]
