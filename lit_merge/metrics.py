"""Accuracy per task of the merged network, beside the base and the expert on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric

__all__ = ("Hits", "Results", "TaskScores", "mean_over_tasks")

Kind = Literal["merged", "expert", "base"]
Results = dict[str, dict[str, Any]]
_KEYS: dict[Kind, str] = {"merged": "accuracy", "expert": "expert_accuracy", "base": "base_accuracy"}


class Hits(Metric):
    """Number of correct predictions and of images, summed over batches and ranks. Higher is better.

    >>> hits = Hits()
    >>> hits.update(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1]))
    >>> hits.compute()
    tensor([1, 2])
    """

    correct: Tensor
    total: Tensor
    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("correct", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: logits ``(B, C)`` and labels ``(B,)``."""
        self.add(logits.argmax(-1), labels)

    def add(self, predictions: Tensor, labels: Tensor) -> None:
        """Count class indices ``(B,)`` against labels ``(B,)``."""
        self.correct += (predictions == labels).sum()
        self.total += len(labels)
        self._computed = None  # as update() would do; it is not asked for in a direct call
        self._update_count += 1

    def reset(self) -> None:
        """Forget all counts; that there is nothing to count on a rank is no reason for a warning."""
        super().reset()
        self._update_count = 1

    def compute(self) -> Tensor:
        """Return correct and total, ``(2,)``."""
        return torch.stack([self.correct, self.total])


class TaskScores(nn.Module):
    """Counts of every task for merged network, expert and base.

    Args:
        tasks: Names of the tasks that are merged.
        unseen: Names of further tasks that are scored; they have results of their own.
    """

    def __init__(self, tasks: Sequence[str], unseen: Sequence[str] = ()) -> None:
        super().__init__()
        self.unseen = tuple(unseen)
        self.tasks = (*tasks, *unseen)
        # lists, not dictionaries: a task may have any name
        self.kinds = nn.ModuleDict({kind: nn.ModuleList(Hits() for _ in self.tasks) for kind in _KEYS})

    def reset(self) -> None:
        """Forget all counts."""
        for hits in self.kinds.modules():
            if isinstance(hits, Hits):
                hits.reset()

    def update(self, kind: Kind, task: str, logits: Tensor, labels: Tensor) -> None:
        """Count a batch of one task."""
        self._hits(kind, task).update(logits, labels)

    def _hits(self, kind: Kind, task: str) -> Hits:
        hits = self.kinds[kind][self.tasks.index(task)]  # type: ignore[index, unused-ignore]
        assert isinstance(hits, Hits)
        return hits

    def compute(self, *, references: bool) -> Results:
        """Return the accuracies of all ranks together.

        Args:
            references: Whether expert and base were counted as well.

        Returns:
            ``{"tasks": {task: {"n", "accuracy", ...}}, "mean": {...}}`` in fractions of 1; ``normalized_accuracy`` is
            accuracy / expert accuracy. Tasks without images are left out. Unseen tasks are in ``"unseen"``, which has
            the same form, and have no expert accuracy if they have no expert.
        """
        kinds: tuple[Kind, ...] = ("merged", "expert", "base") if references else ("merged",)
        tasks: dict[str, dict[str, Any]] = {}
        for task in self.tasks:
            # every rank asks in the same order, since asking is a collective operation
            counts = {kind: self._hits(kind, task).compute().tolist() for kind in kinds}
            if (total := counts["merged"][1]) == 0:
                continue
            row: dict[str, Any] = {"n": total}
            row |= {_KEYS[kind]: correct / total for kind, (correct, _) in counts.items()}
            if references and counts["expert"][1] == 0:
                del row["expert_accuracy"]
            elif references:
                row["normalized_accuracy"] = row["accuracy"] / max(row["expert_accuracy"], 1 / total)
            tasks[task] = row
        unseen = {task: tasks.pop(task) for task in self.unseen if task in tasks}
        results: Results = {"tasks": tasks, "mean": mean_over_tasks(tasks)}
        return results | ({"unseen": {"tasks": unseen, "mean": mean_over_tasks(unseen)}} if unseen else {})


def mean_over_tasks(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Unweighted mean over the tasks of every accuracy that all of them have.

    >>> mean_over_tasks({"a": {"n": 1, "accuracy": 0.5}, "b": {"n": 9, "accuracy": 1.0}})
    {'accuracy': 0.75}
    """
    rows = list(tasks.values())
    keys = [key for key in next(iter(rows), {}) if key.endswith("accuracy") and all(key in row for row in rows)]
    return {key: fmean(row[key] for row in tasks.values()) for key in keys}
