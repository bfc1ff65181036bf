"""Experts that arrive one by one: what a method is told of a stage, and what taking one out again would need."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_merge.errors import MergeError

__all__ = ("Removal", "Stage", "StageSteps")


@dataclass(frozen=True)
class Stage:
    """One arrival of an expert in a stream.

    Attributes:
        number: From 1.
        task: Task of the expert that arrives.
        history: Tasks absorbed before it, in order.
        numbers: Plain JSON data that the method keeps between stages; :meth:`StageSteps.absorb` may change it.
        expert: Task vectors by name, ``(*shape)`` each, of an expert that was seen, read again.
    """

    number: int
    task: str
    history: tuple[str, ...]
    numbers: dict[str, Any]
    expert: Callable[[str], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Removal:
    """What taking an expert out of a stream would need.

    Attributes:
        exact: Whether :meth:`StageSteps.remove` does it from the merged task vector and that expert alone.
        needs: Tasks whose experts have to be at hand.
        how: One sentence.
    """

    exact: bool
    needs: tuple[str, ...]
    how: str


class StageSteps:
    """The part of :class:`~lit_merge.MergeModule` for experts that arrive one by one."""

    bank: Any

    @abstractmethod
    def merge(self, bank: Any) -> dict[str, Tensor]:  # noqa: ANN401 - said by MergeModule
        """Return the merged parameters by name."""

    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the merged task vector after an expert arrived.

        By default the first expert is the first merge, and later the rule is applied to merged task vector and
        expert as to two experts.

        Args:
            merged: Merged task vector so far, ``(*shape)`` each, at least float32; zeros in stage 1.
            incoming: Task vector of the expert, alike.
            stage: Which expert it is, and what the method keeps between stages.
        """
        if stage.number == 1:
            return dict(incoming)
        state = self.merge(self.bank)
        base = self.bank.base
        return {name: state[name].to(value.dtype) - base[name].to(value.dtype) for name, value in merged.items()}

    def removal(self, task: str, history: Sequence[str], numbers: Mapping[str, Any]) -> Removal:
        """Say what taking an expert out of the stream again would need.

        Args:
            task: Its task.
            history: Tasks absorbed so far, in order.
            numbers: What the method keeps between stages.
        """
        others = tuple(name for name in history if name != task)
        return Removal(
            False, others, f"{type(self).__name__} keeps no trace of a single expert: merge the others again"
        )

    def remove(
        self,
        merged: Mapping[str, Tensor],
        expert: Mapping[str, Tensor],
        task: str,
        history: Sequence[str],
        numbers: Mapping[str, Any],
    ) -> dict[str, Tensor]:
        """Return the merged task vector as if an expert had never arrived, where that is exact.

        Args:
            merged: Merged task vector, ``(*shape)`` each.
            expert: Task vector of the expert, alike.
            task: Its task.
            history: Tasks absorbed so far, in order.
            numbers: What the method keeps between stages.

        Raises:
            MergeError: The method cannot.
        """
        found = self.removal(task, history, numbers)
        raise MergeError(
            f"{type(self).__name__}: cannot remove {task!r} from the merge alone: {found.how}; "
            f"it needs {', '.join(found.needs) or 'nothing else'}"
        )
