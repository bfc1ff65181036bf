"""What the tests of callbacks share."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from lit_merge.trainer import MergeTrainer


def trainer_of(*callbacks: L.Callback, **options: Any) -> MergeTrainer:
    """A trainer for one epoch that is quiet and logs nothing."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "max_epochs": 1} | quiet
    return MergeTrainer(callbacks=list(callbacks), **(defaults | options))


class Batches(L.Callback):
    """Keeps what was shown."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, _: int) -> None:
        self.seen.append({task: part.images for task, part in batch.items()})
