"""SequentialModule: merges that are defined by what they do when one more expert arrives."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_merge.module import MergeModule
from lit_merge.stages import Stage
from lit_merge.task_vectors import TaskVectors

__all__ = ("SequentialModule",)


class SequentialModule(MergeModule):
    """A merge that takes the experts one by one; a method says :meth:`absorb` and no more.

    ::

        class Latest(SequentialModule):
            def absorb(self, merged, incoming, stage):
                return {name: 0.5 * merged[name] + incoming[name] for name in merged}

    Given all experts at once, it absorbs them in the order of the suite. It learns nothing.

    Args:
        **kwargs: See :class:`~lit_merge.MergeModule`.
    """

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - passed on to the base class
        super().__init__(**kwargs)
        self._folded: tuple[TaskVectors, tuple[Any, ...], dict[str, Tensor], list[dict[str, Any]]] | None = None

    @abstractmethod
    def absorb(self, merged: Mapping[str, Tensor], incoming: Mapping[str, Tensor], stage: Stage) -> dict[str, Tensor]:
        """Return the merged task vector after an expert arrived.

        Args:
            merged: Merged task vector so far, ``(*shape)`` each, at least float32; zeros in stage 1. Read-only.
            incoming: Task vector of the expert, alike.
            stage: Which expert it is, and what the method keeps between stages: write plain JSON data to its numbers.
        """

    @torch.no_grad()
    def merge(self, bank: TaskVectors) -> dict[str, Tensor]:
        """Return θ0 + the merged task vector after all experts of the bank, one after the other.

        The result for the module's own bank is kept (one model), because evaluation, report and export ask for it; a
        bank that changed meanwhile is absorbed again.
        """
        if bank is not getattr(self, "bank", None):
            return bank.offset(self.fold(bank)[0])
        deltas = bank.deltas.values()
        state = tuple((delta.device, _version(delta)) for delta in deltas)
        if self._folded is None or self._folded[0] is not bank or self._folded[1] != state:
            self._folded = (bank, state, *self.fold(bank))
        return bank.offset(self._folded[2])

    def fold(self, bank: TaskVectors) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """Absorb the experts of a bank in their order.

        Args:
            bank: The experts.

        Returns:
            Merged task vector, ``(*shape)`` each, and the numbers that the method kept after each stage.
        """
        deltas = bank.deltas

        def row(task: str) -> dict[str, Tensor]:
            number = bank.tasks.index(task)
            return {name: delta[number].to(bank.compute_dtype) for name, delta in deltas.items()}

        merged = {name: torch.zeros_like(delta[0], dtype=bank.compute_dtype) for name, delta in deltas.items()}
        numbers: list[dict[str, Any]] = []
        for place, task in enumerate(bank.tasks):
            kept = dict(numbers[-1]) if numbers else {}
            with torch.autocast(next(iter(merged.values())).device.type if merged else "cpu", enabled=False):
                merged = self.absorb(merged, row(task), Stage(place + 1, task, bank.tasks[:place], kept, row))
            numbers.append(kept)
        return merged, numbers

    def report_extra(self) -> dict[str, Any]:
        """Return order and numbers of the stages, if they were all merged here."""
        if self._folded is None:
            return {}
        bank, _, _, numbers = self._folded
        return {"sequential": [{"task": task, **kept} for task, kept in zip(bank.tasks, numbers, strict=True)]}


def _version(delta: Tensor) -> int | object:
    """Return what changes when a tensor is written to; always another thing where that is not known."""
    return object() if delta.is_inference() else delta._version
