"""The contract of a transform, and what it needs when a network is too large to be seen at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, Protocol

from torch import Tensor

__all__ = ("DeltaMap", "Needs", "Pieces", "Transform")

Needs = Literal["tensor", "statistics", "network", "data"]
"""What a rule or transform must see at once, see :mod:`lit_merge.streaming`."""

DeltaMap = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Maps task vectors, ``{name: (T, *shape)}``, to task vectors."""


class Pieces(Protocol):
    """Task vectors of a network, ``{name: (T, *shape)}`` for some tensors at a time, in sorted order of names.

    A large tensor of which rule and transforms take the entries one by one (``entrywise``) comes in parts ``(T, n)``.
    Every iteration reads the network again; nothing of it is kept.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors that have task vectors."""
        ...

    def __iter__(self) -> Iterator[Mapping[str, Tensor]]:
        """Read the network once."""
        ...

    def pairs(self, *, base: bool) -> Iterator[tuple[Mapping[str, Tensor], Mapping[str, Tensor] | None]]:
        """Read the network once, and beside the task vectors the weights of the base, ``(*shape)`` each, if asked."""
        ...


class Transform(ABC):
    """Maps task vectors to task vectors, once, before the rule sees them.

    ``repr`` names the transform and its arguments: a checkpoint of a learned merge is refused under other transforms.
    """

    @property
    def needs(self) -> Needs:
        """What has to be seen at once: the ``network``, unless a transform says less."""
        return "network"

    @abstractmethod
    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return new task vectors with the names and shapes ``(T, *shape)`` of ``deltas``; do not change these."""

    def streamed(self, pieces: Pieces) -> DeltaMap:
        """Return what transforms the pieces of a network one after the other, in sorted order of names.

        Args:
            pieces: The whole network, for statistics of it.
        """
        return self.__call__

    def entrywise(self, name: str, shape: Sequence[int]) -> bool:
        """Whether an entry is made of the same entry of all tasks, and of statistics, and of nothing else.

        A tensor that is too large is then read in parts, which are flat: ``(T, n)`` instead of ``(T, *shape)``.

        Args:
            name: Name of the tensor.
            shape: Its shape.
        """
        return False

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({arguments})"
