"""Validation, test and prediction of a merge."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from lit_merge.data.batches import LabelledBatch
from lit_merge.metrics import Results, TaskScores
from lit_merge.suites.base import Suite
from lit_merge.task_vectors import TaskVectors

__all__ = ("EvaluationSteps",)


class EvaluationSteps(L.LightningModule):
    """The evaluation half of :class:`~lit_merge.MergeModule`: merge once, then score every task.

    Outside of a fit, base and experts are scored on the same images.

    Attributes:
        results: Accuracies of the last evaluation, see :meth:`lit_merge.metrics.TaskScores.compute`.
    """

    suite: Suite
    bank: TaskVectors
    scores: TaskScores

    def __init__(self) -> None:
        super().__init__()
        self.results: Results = {}
        self._merged: dict[str, Tensor] | None = None
        self._base: Mapping[str, Tensor] = {}
        self._expert: tuple[str, dict[str, Tensor]] = ("", {})
        self._waiting: list[str] = []
        self._left: int | float = 0

    @abstractmethod
    def merged_state(self) -> dict[str, Tensor]:
        """Return the complete state dict of the merged network."""

    @abstractmethod
    def expert_state(self, task: str) -> dict[str, Tensor]:
        """Return the complete state dict of one expert."""

    @abstractmethod
    def outputs(self, state: Mapping[str, Tensor], task: str, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and logits of a complete state dict."""

    def has_expert(self, task: str) -> bool:
        """Whether there is an expert to score beside the merge."""
        return self.suite.has_expert(task)

    def with_references(self, results: Results) -> Results:
        """Add what is known of the experts besides; outside of a stream nothing is."""
        return results

    def prepare_evaluation(self) -> None:
        """Do what has to be done once before the merge is scored outside of a fit."""

    @property
    def adapting(self) -> bool:
        """Whether this is inside a fit; validation there shows progress only, without references."""
        return self.trainer.state.fn == "fit"

    def _begin_evaluation(self) -> None:
        self.scores.reset()
        if not self.adapting:
            self.prepare_evaluation()
        self._merged = self.merged_state()
        if not self.adapting and not self.trainer.predicting:
            self._base = self.bank.base  # once, and at a moment that all ranks have in common
            self._waiting = list(self._tasks()) if self.bank.storage.shared else []
            validating = self.trainer.validating
            self._left = sum(self.trainer.num_val_batches if validating else self.trainer.num_test_batches)

    def _end_evaluation(self, prefix: str) -> None:
        self._fetch_the_rest()  # where the number of batches was not known
        # dropped, not reused: tensors made in inference mode cannot take part in training
        self._merged, self._base, self._expert = None, {}, ("", {})
        self.results = self.scores.compute(references=not self.adapting)
        if not self.adapting:
            self.results = self.with_references(self.results)
        for key, value in self.results["mean"].items():
            self.log(f"{prefix}/{key}", value, prog_bar=key == "accuracy", sync_dist=True)
        unseen = self.results.get("unseen", {"tasks": {}, "mean": {}})
        for task, row in [*self.results["tasks"].items(), *unseen["tasks"].items()]:
            self.log(f"{prefix}/accuracy/{task}", row["accuracy"], sync_dist=True)
        for key, value in unseen["mean"].items():
            self.log(f"{prefix}/unseen/{key}", value, sync_dist=True)

    def _evaluate(self, batch: LabelledBatch, task: str) -> None:
        assert self._merged is not None
        self.scores.update("merged", task, self.outputs(self._merged, task, batch.images)[1], batch.labels)
        if self.adapting:
            return
        if self.has_expert(task):
            while task in self._waiting:  # ranks that share a bank ask for all experts in one order
                self._next_expert()
            if self._expert[0] != task:
                self._expert = (task, self.expert_state(task))
            self.scores.update("expert", task, self.outputs(self._expert[1], task, batch.images)[1], batch.labels)
        self.scores.update("base", task, self.outputs(self._base, task, batch.images)[1], batch.labels)
        self._left -= 1
        if self._left == 0:  # before callbacks, whose hooks come first, exchange anything else
            self._fetch_the_rest()

    def _fetch_the_rest(self) -> None:
        """Take part in fetching the experts of tasks that have no image on this rank."""
        while self._waiting:
            self._next_expert()

    def _next_expert(self) -> None:
        if self.has_expert(task := self._waiting.pop(0)):
            self._expert = ("", {})  # one at a time in memory
            self._expert = (task, self.expert_state(task))

    def _tasks(self) -> Sequence[str]:
        """Tasks of this evaluation, in its order."""
        loaders = self.trainer.val_dataloaders if self.trainer.validating else self.trainer.test_dataloaders
        return list(loaders) if isinstance(loaders, Mapping) else self.suite.scored

    def on_validation_epoch_start(self) -> None:
        """Merge once for all batches."""
        self._begin_evaluation()

    def validation_step(self, batch: LabelledBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the hits of a labelled batch of one task."""
        self._evaluate(batch, self._task(self.trainer.val_dataloaders, dataloader_idx))

    def on_validation_epoch_end(self) -> None:
        """Log accuracies and drop the merged weights."""
        self._end_evaluation("val")

    def on_test_epoch_start(self) -> None:
        """Merge once for all batches."""
        self._begin_evaluation()

    def test_step(self, batch: LabelledBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Count the hits of a labelled batch of one task."""
        self._evaluate(batch, self._task(self.trainer.test_dataloaders, dataloader_idx))

    def on_test_epoch_end(self) -> None:
        """Log accuracies and drop the merged weights."""
        self._end_evaluation("test")

    def on_predict_start(self) -> None:
        """Merge once for all batches."""
        self._begin_evaluation()

    def on_predict_end(self) -> None:
        """Drop the merged weights."""
        self._merged = None

    def predict_step(self, batch: LabelledBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the task, positions ``(B,)`` and predicted classes ``(B,)`` of a batch."""
        task = self._task(self.trainer.predict_dataloaders, dataloader_idx)
        assert self._merged is not None
        logits = self.outputs(self._merged, task, batch.images)[1]
        return {"task": task, "index": batch.index, "prediction": logits.argmax(-1)}

    def _task(self, loaders: object, index: int) -> str:
        names = list(loaders) if isinstance(loaders, Mapping) else list(self.suite.scored)
        return self.suite.check_task(names[index])
