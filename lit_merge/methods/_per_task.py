"""Merges that are a network per task: what is stored once is turned into one of them by knowing the task."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lit_merge.data.batches import LabelledBatch
from lit_merge.module import MergeModule
from lit_merge.task_vectors import TaskVectors

__all__ = ("PerTaskModule",)


class PerTaskModule(MergeModule):
    """A merge that stores one network and a small modulator per task, and runs as T networks.

    Scores, predictions and :meth:`forward` are those of the task's own network, so they assume that the task of
    every image is known; compare them with other compressions of T experts, not with merges into one network. Running
    statistics are those of the task's expert, whatever ``buffers`` says of the stored network. What
    :meth:`export` writes is the stored network without modulators, and an unseen task is scored on it;
    :meth:`task_state` gives the network of a task.
    """

    no_stream = "it is a network per task"
    no_sharding = "it makes a network per task during an evaluation, in which every rank is elsewhere"
    _modulated: str | None = None

    @abstractmethod
    def task_vector(self, bank: TaskVectors, task: int) -> dict[str, Tensor]:
        """Return the reconstructed task vector of task number ``task``, ``(*shape)`` each."""

    @torch.no_grad()
    def task_state(self, task: str) -> dict[str, Tensor]:
        """Return the complete state dict of one task's network; of an unseen task, the stored network's.

        Args:
            task: Name of the task.
        """
        if task not in self.bank.tasks:
            return self.merged_state()
        state = self.bank.complete(self.bank.offset(self.task_vector(self.bank, self.bank.tasks.index(task))))
        own = self.bank.expert(task)  # statistics of other networks, averaged or measured, would not fit this one
        return {name: own[name] if name in self.skeleton.buffers_of else value for name, value in state.items()}

    @property
    def modulator_bytes(self) -> int:
        """Bytes of all modulators: a bit per entry and task, packed, and a number per task."""
        return len(self.bank.tasks) * ((sum(self.bank.sizes) + 7) // 8 + 4)

    @property
    def stored_bytes(self) -> int:
        """Bytes to be kept to serve all tasks: base, vector, modulators, and the tasks' running statistics."""
        base = self.bank.base
        vector = sum(base[name].nbytes for name in self.bank.names)
        statistics = len(self.bank.tasks) * sum(base[name].nbytes for name in self.skeleton.buffers_of)
        return super().stored_bytes + vector + self.modulator_bytes + statistics

    def report_extra(self) -> dict[str, Any]:
        """Say that T networks were scored, and how large what makes them is."""
        tasks = len(self.bank.tasks)
        return {"networks": tasks, "task_identity": "known", "modulator_bytes": self.modulator_bytes}

    def forward(self, images: Tensor, task: str) -> Tensor:
        """Return the logits of a task's network: images ``(B, C, H, W)`` to ``(B, classes)``."""
        return self.outputs(self.task_state(task), task, images)[1]

    def predict_step(self, batch: LabelledBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return the task, positions ``(B,)`` and predicted classes ``(B,)`` of a batch."""
        self._enter(self._task(self.trainer.predict_dataloaders, dataloader_idx))
        return super().predict_step(batch, batch_idx, dataloader_idx)

    def _begin_evaluation(self) -> None:
        super()._begin_evaluation()
        self._modulated = None

    def _evaluate(self, batch: LabelledBatch, task: str) -> None:
        self._enter(task)
        super()._evaluate(batch, task)

    def _enter(self, task: str) -> None:
        """Make the task's network the one that is scored; loaders come task by task, so this is done once for each."""
        if self._modulated != task:
            self._merged, self._modulated = self.task_state(task), task
