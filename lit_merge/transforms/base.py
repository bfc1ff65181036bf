"""The contract of a transform."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

__all__ = ("Transform",)


class Transform(ABC):
    """Maps task vectors to task vectors, once, before the rule sees them.

    ``repr`` names the transform and its arguments: a checkpoint of a learned merge is refused under other transforms.
    """

    @abstractmethod
    def __call__(self, deltas: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return new task vectors with the names and shapes ``(T, *shape)`` of ``deltas``; do not change these."""

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__name__}({arguments})"
