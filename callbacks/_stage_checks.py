"""Does a stream fit its method, its data and its Trainer?"""

from __future__ import annotations

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lit_merge.callbacks.resume_point import ResumePoint
from lit_merge.data_free_module import DataFreeModule
from lit_merge.errors import MergeError
from lit_merge.module import MergeModule

__all__ = ("check_stream",)


def check_stream(
    trainer: L.Trainer,
    module: MergeModule,
    data: object,
    epochs: int,
    images: str,
    total: int | None,
    set_before: int | None,
) -> None:
    """Refuse what makes no sense.

    Args:
        trainer: Its limits.
        module: The merge.
        data: The data module, or ``None``.
        epochs: Epochs of a stage, as asked for.
        images: Whose images a stage adapts on.
        total: Epochs of the whole stream; ``None`` if nobody knows.
        set_before: What the callback made of the Trainer's limit in an earlier fit.

    Raises:
        MergeError: Something does not fit; the message says what to do.
    """
    name = type(module).__name__
    if module.learnable and not epochs:
        raise MergeError(f"SequentialMerging.epochs_per_task: {name} learns, so it needs at least 1, found 0")
    if not module.learnable and epochs:
        raise MergeError(
            f"SequentialMerging.epochs_per_task: {name} has nothing to learn, so it must be 0, found {epochs}"
        )
    if module.learnable and images == "none" and not isinstance(module, DataFreeModule):
        raise MergeError(f"SequentialMerging.data: none, but {name} learns from images; use current or seen")
    if getattr(data, "protocol", None) == "online":
        raise MergeError("data.protocol: online shows every image once, in one epoch; a stream needs another one")
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    if not any(isinstance(callback, ResumePoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        rank_zero_warn("SequentialMerging: without the callback ResumePoint a killed stream cannot be resumed")
    if trainer.max_steps != -1:
        raise MergeError(
            f"trainer.max_steps: a stream ends with its last expert, found {trainer.max_steps}; leave it out"
        )
    given = trainer.max_epochs
    unset = (None, -1, 1000, set_before, *(() if module.learnable else (0,)))  # 1000 is Lightning's default
    if given not in unset and given != total:
        each = max(1, epochs)
        what = "as many experts as arrive" if total is None else f"{total // each} tasks"
        end = "" if total is None else f", are {total}"
        raise MergeError(f"trainer.max_epochs: {what}, {each} epochs each{end}, found {given}; leave it out")
