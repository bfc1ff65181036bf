"""One atomic checkpoint from which a killed run goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from lit_merge.errors import MergeError
from lit_merge.sinks import run_dir

__all__ = ("ResumePoint",)


class ResumePoint(Checkpoint):
    """Write ``last.ckpt`` into the run's folder; ``--ckpt_path last`` starts, resumes or finishes the run from it.

    It is never written between the last batch of an epoch and the end of that epoch: Lightning would resume from
    there without the epoch's end hooks.

    Args:
        every_n_steps: Steps between two checkpoints; the end of each epoch always has one.

    Raises:
        MergeError: ``every_n_steps`` is below 1.
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise MergeError(f"ResumePoint.every_n_steps: expected at least 1, found {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.path: Path | None = None
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Decide on the path; all ranks agree on it."""
        if stage == "fit":
            self.path = run_dir(trainer) / "last.ckpt"

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Note the step, to tell whether this batch completes one."""
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Save in the middle of an epoch, but not of accumulated gradients: a checkpoint does not have them."""
        stepped = trainer.global_step > self._step
        if stepped and not trainer.is_last_batch and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save at the end of an epoch."""
        self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if self.path is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.save()  # no metric from before the checkpoint is lost with the process
        # Lightning moves the file from the system's folder for temporary files, where it cannot be renamed from if
        # that is another disk; hence a name beside it. Saving is said to be of everything, or it remarks on that.
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            temporary.replace(self.path)
