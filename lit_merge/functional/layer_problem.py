"""Layer problems: what a learned data-free merge minimises, stated for several layers of one shape at once.

Layers do not see each other, so a network is a list of independent problems. Equal shapes are batched: one parameter a
shape, and one kernel for small layers; a large layer is a view of the bank, so that nothing of its size is copied.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import torch
from torch import Tensor

from lit_merge.errors import MergeError

__all__ = (
    "LayerChoice",
    "LayerProblem",
    "Others",
    "check_others",
    "choose_layers",
    "descend",
    "layer_batches",
    "layer_shapes",
    "merge_other",
)

LayerChoice = Literal["blocks", "matrices"]
Others = Literal["base", "mean", "sum"]

_BATCH = 2**18
"""Entries of task vectors that are copied into one batch: beyond 1 MiB a kernel has enough to do with one layer."""


class LayerProblem(ABC):
    """An objective on the task vectors of L layers of one shape; a subclass says :meth:`losses` and no more.

    Args:
        deltas: Task vectors ``(L, T, m, n)``; read, never written, and of any floating type.

    Attributes:
        deltas: As given.
        dtype: Type of all arithmetic: at least float32.

    >>> class Nearest(LayerProblem):
    ...     def losses(self, value):
    ...         return (value[:, None] - self.deltas).square().sum((1, 2, 3))
    >>> problem = Nearest(torch.tensor([[[[1.0]], [[5.0]]]]))
    >>> problem.gradient(problem.start())
    (tensor([26.]), tensor([[[-12.]]]))
    """

    def __init__(self, deltas: Tensor) -> None:
        self.deltas = deltas
        self.dtype = torch.promote_types(deltas.dtype, torch.float32)

    @abstractmethod
    def losses(self, value: Tensor) -> Tensor:
        """Return the objective of each layer ``(L,)`` at what is learned, ``(L, m, n)`` by default."""

    def start(self) -> Tensor:
        """Return where to begin: zeros ``(L, m, n)`` by default; the shape decides on the shape of what is learned."""
        layers, _, *shape = self.deltas.shape
        return torch.zeros(layers, *shape, dtype=self.dtype, device=self.deltas.device)

    def project(self, gradient: Tensor) -> Tensor:
        """Return the part of the gradient that is followed: by default all of it."""
        return gradient

    def gradient(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses ``(L,)`` and the projected gradient of their sum, of the shape of ``value``.

        By default it is autograd's, through :meth:`losses`. A closed form is usually several times faster.
        """
        with torch.enable_grad():
            point = value.detach().requires_grad_()
            losses = self.losses(point)
            (gradient,) = torch.autograd.grad(losses.sum(), point)
        return losses.detach(), self.project(gradient)


def choose_layers(
    deltas: Mapping[str, Tensor], layers: LayerChoice = "blocks", exclude: Sequence[str] = ()
) -> tuple[str, ...]:
    """Choose the tensors that are learned.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        layers: ``matrices``: every matrix, position embeddings too; ``blocks``: those inside of a numbered block, such
            as ``transformer.resblocks.3.mlp.c_fc.weight``, so neither embeddings nor projections at the ends.
        exclude: Names, with the wildcards ``*``, ``?`` and ``[...]``, that are left out.

    Returns:
        Their names, in the order of ``deltas``.

    Raises:
        MergeError: ``layers`` is unknown, ``exclude`` is not a list, or nothing is left.

    >>> choose_layers({"embed": torch.zeros(1, 4, 2), "h.0.w": torch.zeros(1, 2, 2), "h.0.b": torch.zeros(1, 2)})
    ('h.0.w',)
    """
    if layers not in get_args(LayerChoice):
        raise MergeError(f"layers: expected blocks or matrices, found {layers!r}")
    if isinstance(exclude, str):
        raise MergeError(f"exclude: expected a list of names or patterns, found {exclude!r}")
    chosen = tuple(
        name
        for name, delta in deltas.items()
        if delta.ndim == 3
        and (layers == "matrices" or any(part.isdecimal() for part in name.split(".")))
        and not any(fnmatchcase(name, pattern) for pattern in exclude)
    )
    if not chosen:
        left = f" after excluding {', '.join(exclude)}" if exclude else ""
        advice = "; give layers: matrices for those outside of numbered blocks" if layers == "blocks" else ""
        raise MergeError(f"layers: expected at least one matrix among {layers}{left}, found none{advice}")
    return chosen


def layer_shapes(deltas: Mapping[str, Tensor], names: Sequence[str]) -> dict[tuple[int, int], tuple[str, ...]]:
    """Group matrices by shape.

    Args:
        deltas: Task vectors, ``(T, *shape)`` each.
        names: Which of them.

    Returns:
        Names per shape ``(m, n)``; shapes in increasing order, names in that of ``names``.

    >>> layer_shapes({"a": torch.zeros(1, 2, 3), "b": torch.zeros(1, 2, 2), "c": torch.zeros(1, 2, 3)}, ["a", "b", "c"])
    {(2, 2): ('b',), (2, 3): ('a', 'c')}
    """
    groups: dict[tuple[int, int], tuple[str, ...]] = {}
    for name in names:
        _, height, width = deltas[name].shape
        groups[height, width] = (*groups.get((height, width), ()), name)
    return dict(sorted(groups.items()))


def layer_batches(deltas: Mapping[str, Tensor], names: Sequence[str]) -> Iterator[tuple[slice, Tensor]]:
    """Yield the task vectors of layers of one shape in batches.

    Args:
        deltas: Task vectors, ``(T, m, n)`` each.
        names: Layers of one shape.

    Yields:
        Which of ``names``, and their task vectors ``(L, T, m, n)``: a view of a single large layer, or a copy of
        several small ones. In either the rows of one layer can be taken together without a copy.
    """
    size = max(1, _BATCH // max(1, deltas[names[0]].numel()))
    for first in range(0, len(names), size):
        part = [deltas[name].transpose(0, 1) for name in names[first : first + size]]
        rows = part[0].unsqueeze(0) if len(part) == 1 else torch.stack(part)
        yield slice(first, first + len(part)), rows.transpose(1, 2)


def check_others(others: str) -> None:
    """Refuse what :func:`merge_other` does not know.

    Raises:
        MergeError: ``others`` is unknown.
    """
    if others not in get_args(Others):
        raise MergeError(f"others: expected base, mean or sum, found {others!r}")


def merge_other(delta: Tensor, others: Others) -> Tensor:
    """Merge a tensor that is not learned.

    Args:
        delta: Its task vectors ``(T, *shape)``.
        others: It stays at the ``base``, or takes their ``mean`` or their ``sum``.

    Returns:
        Merged task vector ``(*shape)``, at least in float32.

    Raises:
        MergeError: ``others`` is unknown.

    >>> merge_other(torch.tensor([[1.0], [3.0]]), "mean")
    tensor([2.])
    """
    check_others(others)
    dtype = torch.promote_types(delta.dtype, torch.float32)
    if others == "base":
        return torch.zeros_like(delta[0], dtype=dtype)
    return delta.mean(0, dtype=dtype) if others == "mean" else delta.sum(0, dtype=dtype)


@torch.no_grad()
def descend(problem: LayerProblem, steps: int, rate: float) -> Tensor:
    """Minimise with Adam from the start of the problem.

    Args:
        problem: What is minimised.
        steps: Steps, at least 0.
        rate: Learning rate, at least 0.

    Returns:
        What was learned.

    Raises:
        MergeError: A value is out of range, or the result is not finite.
    """
    for name, given in (("steps", steps), ("rate", rate)):
        if not given >= 0:
            raise MergeError(f"{name}: expected at least 0, found {given}")
    value = problem.start().contiguous()  # the fused optimizer goes through memory, whatever the strides are
    optimizer = torch.optim.Adam([value], lr=rate, fused=True)
    for _ in range(steps):
        value.grad = problem.gradient(value)[1].contiguous()
        optimizer.step()
    value.grad = None
    if not bool(torch.isfinite(value).all()):
        raise MergeError(f"rate: {rate} made a value that is not finite; give a lower one")
    return value
