"""Outputs of the experts, computed once per image."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lit_merge.data.batches import UnlabelledBatch

__all__ = ("TeacherCache",)

Outputs = tuple[Tensor, Tensor]


class TeacherCache:
    """Keeps an expert's features and logits per image while a memory budget lasts.

    Adaptation images are never augmented, so an image always has the same outputs.

    Args:
        budget: Bytes that may be used over all tasks; a task that does not fit is computed anew each time.
    """

    def __init__(self, budget: int = 2**30) -> None:
        self.budget = budget
        # which positions are there is known on the host: asking the device would wait for all that it has to do
        self._kept: dict[str, tuple[set[int], Tensor, Tensor] | None] = {}

    def clear(self) -> None:
        """Forget everything; the whole budget is free again."""
        for kept in self._kept.values():
            self.budget += 0 if kept is None else sum(x.numel() * x.element_size() for x in kept[1:])
        self._kept = {}

    def knows(self, task: str, batch: UnlabelledBatch) -> bool:
        """Whether the expert's outputs for all images of a batch are kept."""
        kept = self._kept.get(task)
        return kept is not None and kept[0].issuperset(batch.on_host())

    def outputs(
        self, task: str, batch: UnlabelledBatch, size: Callable[[], int], compute: Callable[[Tensor], Outputs]
    ) -> Outputs:
        """Return features ``(B, D)`` and logits ``(B, C)`` of the expert.

        Args:
            task: Name of the task.
            batch: Its images and their positions.
            size: Number of positions of the task; asked for once.
            compute: Maps images to features and logits.
        """
        kept = self._kept.get(task)
        if kept is not None and kept[0].issuperset(batch.on_host()):
            return kept[1][batch.index], kept[2][batch.index]
        features, logits = compute(batch.images)
        if task not in self._kept:
            self._kept[task] = kept = self._reserve(size(), features, logits)
        if kept is not None:
            known, all_features, all_logits = kept
            all_features[batch.index], all_logits[batch.index] = features, logits
            known.update(batch.on_host())
        return features, logits

    def _reserve(self, size: int, features: Tensor, logits: Tensor) -> tuple[set[int], Tensor, Tensor] | None:
        needed = size * sum(x[0].numel() * x.element_size() for x in (features, logits))
        if needed > self.budget:
            return None
        self.budget -= needed
        return set(), features.new_empty(size, *features.shape[1:]), logits.new_empty(size, *logits.shape[1:])
