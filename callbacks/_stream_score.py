"""Accuracy of a stream: every image is scored when it arrives."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_merge.metrics import Results, mean_over_tasks

__all__ = ("StreamScore",)


class StreamScore:
    """Counts hits of the predictions that were made before the step that uses the images.

    They are counted when they are asked for: until then each image takes 16 bytes of the device.

    Attributes:
        counts: Correct predictions and images per task on this rank, as of the last :meth:`settle`.
    """

    def __init__(self) -> None:
        self.counts: dict[str, list[int]] = {}
        self._waiting: dict[str, list[Tensor]] = {}

    def update(self, outputs: dict[str, Any]) -> None:
        """Note a step's predictions and images on the device; nothing waits for it."""
        for task, logits in outputs["logits"].items():
            seen = torch.stack([logits.argmax(-1), outputs["index"][task]])
            self._waiting.setdefault(task, []).append(seen)

    def settle(self, trainer: L.Trainer) -> None:
        """Look up the labels of the images so far, which the steps themselves never saw."""
        for task, parts in self._waiting.items():
            predicted, index = torch.cat(parts, 1).cpu()
            labels = trainer.datamodule.labels(task, index.tolist())  # type: ignore[attr-defined]
            correct, total = self.counts.get(task, [0, 0])
            self.counts[task] = [correct + int((predicted == labels).sum()), total + len(labels)]
        self._waiting = {}

    def total(self, trainer: L.Trainer) -> dict[str, list[int]]:
        """Counts of all ranks together; they all have to ask."""
        self.settle(trainer)
        totals = {}
        for task, counts in self.counts.items():  # every rank has every task, in the same order
            local = torch.tensor(counts, device=trainer.strategy.root_device)
            totals[task] = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        return totals

    def load(self, trainer: L.Trainer, totals: dict[str, list[int]]) -> None:
        """Go on with the counts of all ranks together."""
        self._waiting = {}
        self.counts = {task: counts if trainer.is_global_zero else [0, 0] for task, counts in totals.items()}

    def applied(self, trainer: L.Trainer, results: Results) -> Results:
        """Return the results with the stream's accuracies in front, if there was a stream."""
        totals = self.total(trainer)
        if not totals:
            return results
        tasks = {}
        for task, row in results["tasks"].items():
            correct, total = totals.get(task, [0, 0])
            accuracy = correct / max(total, 1)
            normalized = accuracy / max(row["expert_accuracy"], 1 / max(total, 1))
            tasks[task] = row | {
                "accuracy": accuracy,
                "normalized_accuracy": normalized,
                "final_accuracy": row["accuracy"],
            }
        return {**results, "tasks": tasks, "mean": mean_over_tasks(tasks)}
