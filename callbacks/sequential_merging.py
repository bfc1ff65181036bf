"""Merge a stream of experts one after the other, in the memory of two."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_merge.callbacks._continual_report import draw, log_stage, publish, summary
from lit_merge.callbacks._stage_checks import check_stream
from lit_merge.callbacks._stage_order import StageOrder
from lit_merge.callbacks._stage_scores import count_hits
from lit_merge.callbacks.report import Report
from lit_merge.data.steps import Steps
from lit_merge.errors import ChangedExpertError, MergeError
from lit_merge.module import MergeModule
from lit_merge.progress import Progress
from lit_merge.sinks import run_dir
from lit_merge.stage_files import clean_stages, write_stage

__all__ = ("SequentialMerging",)

StageData = Literal["current", "seen", "none"]
Evaluate = Literal["seen", "all", "none"]


class SequentialMerging(L.Callback):
    """One fit that merges experts as they arrive; each is read once, and old ones are not needed again.

    Memory holds the base, the merged task vector and one expert, however many experts there are. A stage takes
    ``epochs_per_task`` epochs of the fit: the expert is put beside the merge, in a bank of two rows; a method that
    learns begins anew on the two (parameters, optimizers, schedulers); and in the end
    :meth:`~lit_merge.MergeModule.absorb` makes one task vector of them. The first expert is taken as it is: there is
    nothing to balance it against, so its epochs are passed over without a step. A method that learns nothing has
    ``epochs_per_task: 0``, and a fit of one epoch without a step for every expert.

    After every stage the merged network is written to ``stage_003.safetensors``, scored, and named in ``last.ckpt``,
    which :class:`~lit_merge.callbacks.ResumePoint` writes: put that callback beside this one. Older stages are deleted
    then. A run that was killed at any moment goes on with ``--ckpt_path last`` and comes to the same bits; one with
    other networks, another order, seed or file is refused. Resuming reads those absorbed experts that are still there
    once, to compare their hashes.

    ``report.json`` → ``extra`` → ``continual`` has order, stages, the matrix of accuracies and what follows from it;
    the loggers have the same with the stage as x-axis, and two pictures.

    ``trainer.max_epochs`` is set here, so leave it out or null.

    Args:
        epochs_per_task: Epochs of a stage; 0 for methods that learn nothing.
        order: ``given``: that of the suite; ``shuffle``; a list of tasks of the suite; or the path of something that
            grows: a text file with one task per line, or a folder in which experts appear as ``TASK.safetensors``
            (write them under another suffix and rename them). Heads and images are those of the suite.
        seed: Of a shuffled order; by default that of the data module, else 0.
        data: Whose images a stage adapts on: those of the ``current`` task, of all that were ``seen`` so far, or
            ``none``, for methods that look at none.
        evaluate: After every stage, score all tasks ``seen`` so far, ``all`` tasks of the suite, or ``none``.
        keep: How many stages' files to keep, newest first; null for all.
        wait: Seconds to wait for another expert where the order grows; then the run ends, and the same command with
            ``--ckpt_path last`` goes on later.

    Raises:
        MergeError: A value is out of range; or, later, does not fit the method or the Trainer.
    """

    def __init__(
        self,
        epochs_per_task: int = 0,
        order: str | list[str] = "given",
        seed: int | None = None,
        data: StageData = "current",
        evaluate: Evaluate = "seen",
        keep: int | None = 1,
        wait: float = 0.0,
    ) -> None:
        for name, given, known in (("data", data, StageData), ("evaluate", evaluate, Evaluate)):
            if given not in get_args(known):
                raise MergeError(f"SequentialMerging.{name}: expected {', '.join(get_args(known))}, found {given!r}")
        for name, value, least in (("epochs_per_task", epochs_per_task, 0), ("keep", keep, 1), ("wait", wait, 0)):
            if value is not None and not value >= least:
                raise MergeError(f"SequentialMerging.{name}: expected at least {least}, found {value}")
        self.epochs_per_task = epochs_per_task
        self.order = order
        self.seed = seed
        self.data: StageData = data
        self.evaluate: Evaluate = evaluate
        self.keep = keep
        self.wait = wait
        self._order = StageOrder(order, 0, wait)
        self._epochs = max(1, epochs_per_task)
        self._set_epochs: int | None = None
        self._loaded = 0
        self._began = 0.0

    # Before a fit ------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the module that of a stream, before it reads any network.

        Raises:
            MergeError: Method, data or Trainer do not fit.
        """
        if not isinstance(pl_module, MergeModule):
            raise MergeError(f"SequentialMerging: expected a MergeModule, found {type(pl_module).__name__}")
        data = getattr(trainer, "datamodule", None)
        seed = int(getattr(data, "seed", 0)) if self.seed is None else self.seed
        self._order = StageOrder(self.order, seed, self.wait)
        pl_module.enter_stream(reader=self._order.reader())
        if stage != "fit":
            return
        order = [] if self._order.grows else self._order.tasks(pl_module.suite)
        order = order[:2] if trainer.fast_dev_run else order  # type: ignore[attr-defined]
        self._loaded = 0
        self._epochs = 1 if trainer.fast_dev_run else max(1, self.epochs_per_task)  # type: ignore[attr-defined]
        pl_module.enter_stream(Progress(order, self._order.kind, seed, self._epochs, self.data))
        total = None if self._order.grows else len(order) * self._epochs
        check_stream(trainer, pl_module, data, self.epochs_per_task, self.data, total, self._set_epochs)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if data is not None:
            data.tasks_at = partial(self._tasks_at, pl_module)
        if not pl_module.learnable:
            trainer.fit_loop._data_source.instance = Steps(1)  # no image is needed to pass over an epoch
            if hasattr(trainer.strategy, "configure_ddp"):  # which wants something to train
                trainer.strategy.configure_ddp = lambda: None
        if not any(isinstance(callback, _AfterCheckpoint) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.callbacks.append(_AfterCheckpoint(self))  # type: ignore[attr-defined]

    def _tasks_at(self, module: MergeModule, epoch: int) -> Sequence[str]:
        """Tasks whose images are adapted on in an epoch."""
        assert module.progress is not None
        order = module.progress.order
        stage = min(epoch // self._epochs, len(order) - 1)
        return order[: stage + 1] if self.data == "seen" else order[stage : stage + 1]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on in another order, or with other stages."""
        if "lit_merge_stages" in checkpoint and isinstance(pl_module, MergeModule):
            saved = Progress.of(checkpoint["lit_merge_stages"])
            listed = self._order.tasks(pl_module.suite, saved.order)
            saved.check_alike(listed, self._order.kind, self._order.seed)
            if trainer.state.fn == "fit":
                saved.check_stages(self._epochs, self.data if pl_module.learnable else saved.data)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look for experts, compare those that were absorbed, and say how many epochs there are.

        Raises:
            MergeError: An absorbed expert is another one now, or there is none at all.
        """
        progress = _progress(pl_module)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = run_dir(trainer)
            progress.folder = str(folder)
            if trainer.is_global_zero:
                clean_stages(folder, progress.absorbed, self.keep)
        self._compare(trainer, pl_module)
        self._look(trainer, pl_module)
        if not progress.order:
            raise MergeError(
                f"SequentialMerging.order: there is no expert in {self._order.path} yet; give wait more time"
            )

    def _compare(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Hash absorbed experts that are still there, on rank zero."""
        assert isinstance(module, MergeModule)
        error = ""
        for task in _progress(module).history if trainer.is_global_zero else ():
            try:
                module.read_expert(task)
            except ChangedExpertError as changed:
                error = str(changed)
                break
            except (MergeError, OSError, KeyError):  # it is gone, or half of it: it is not needed again
                continue
        if error := trainer.strategy.broadcast(error):
            raise ChangedExpertError(error)

    def _look(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Learn of more experts where the order grows, and set the number of epochs."""
        assert isinstance(module, MergeModule)
        progress = _progress(module)
        if self._order.grows and progress.absorbed == len(progress.order):
            progress.order = self._order.wait_for_more(trainer, module.suite, progress.order)
        self._set_epochs = trainer.fit_loop.max_epochs = len(progress.order) * self._epochs

    # Stages ------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on within a stage after a resume."""
        self._go_on(trainer, pl_module)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a stage where one is due."""
        assert isinstance(pl_module, MergeModule)
        self._go_on(trainer, pl_module)
        progress = _progress(pl_module)
        if progress.started == trainer.current_epoch // self._epochs:
            progress.started += 1
            progress.first_step = trainer.global_step
            self._open(trainer, pl_module, progress.started, begin=True)
            if pl_module.learnable:
                trainer.strategy.setup_optimizers(trainer)  # schedulers, too; the parameters are the same objects

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End a stage where it is over."""
        _count_passed_over(trainer)
        self._catch_up(trainer, pl_module, (trainer.current_epoch + 1) // self._epochs)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show matrix and pictures; Lightning comes here also when a resumed run has nothing left to train."""
        assert isinstance(pl_module, MergeModule)
        self._catch_up(trainer, pl_module, _epochs_done(trainer) // self._epochs)
        if not trainer.fast_dev_run and (folder := run_dir(trainer)) and trainer.is_global_zero:  # type: ignore[attr-defined]
            content = summary(pl_module, self.data)
            publish(trainer, folder, content)
            draw(trainer, folder, content)

    def _go_on(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        stage = trainer.current_epoch // self._epochs
        self._catch_up(trainer, module, stage)
        if _progress(module).started > stage:
            self._open(trainer, module, stage + 1, begin=False)

    def _catch_up(self, trainer: L.Trainer, module: L.LightningModule, done: int) -> None:
        progress = _progress(module)
        while progress.absorbed < min(done, progress.started):
            self._open(trainer, module, progress.absorbed + 1, begin=False)
            self._finish(trainer, module, progress.absorbed + 1)

    def _open(self, trainer: L.Trainer, module: L.LightningModule, number: int, *, begin: bool) -> None:
        assert isinstance(module, MergeModule)
        if self._loaded == number:
            return
        self._loaded, self._began = number, time.monotonic()
        module.open_stage(number, begin=begin)
        progress = _progress(module)
        own = progress.digests[task := progress.order[number - 1]]
        if trainer.strategy.broadcast(own) != own:
            raise MergeError(f"suite: expert {task!r} differs between ranks; all ranks must read the same files")

    def _finish(self, trainer: L.Trainer, module: L.LightningModule, number: int) -> None:
        assert isinstance(module, MergeModule)
        state, progress = module.close_stage(number), _progress(module)
        task = progress.order[number - 1]
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            folder = run_dir(trainer)
            file = write_stage(folder, number, state) if trainer.is_global_zero else {}
            progress.file = trainer.strategy.broadcast(file)
        del state
        seconds = round(time.monotonic() - self._began, 3)  # of the merge; scoring does not count
        accuracies = self._score(trainer, module, task)
        progress.stages.append(
            {
                "task": task, "accuracies": accuracies, "numbers": dict(progress.numbers), "seconds": seconds,
                "file": dict(progress.file),
            }
        )  # fmt: skip
        if trainer.is_global_zero:
            log_stage(trainer, summary(module, self.data))
        rank_zero_info(f"stage {number}: {task} is in the merge")

    def _score(self, trainer: L.Trainer, module: MergeModule, task: str) -> dict[str, float]:
        progress = _progress(module)
        if self.evaluate == "none":
            return {}
        others = [name for name in module.suite.tasks if name not in progress.history]
        tasks = [*progress.history, *(others if self.evaluate == "all" else ())]
        missing = [name for name in tasks if name not in progress.base]
        progress.base |= count_hits(trainer, module, module.bank.base, missing)
        progress.experts |= count_hits(trainer, module, module.expert_state(task), [task])
        hits = count_hits(trainer, module, module.merged_state(), tasks)
        return {name: correct / max(1, total) for name, (correct, total) in hits.items()}

    # Telling -----------------------------------------------------------------------------------------------------

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the stream to the report."""
        self._report(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the stream to the report, outside of a fit."""
        if trainer.state.fn != "fit":
            self._report(trainer, pl_module)

    def _report(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, MergeModule)
        if not _progress(module).absorbed:
            raise MergeError("SequentialMerging: no expert was merged yet; run fit first, or give --ckpt_path last")
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Report):
                callback.extra["continual"] = summary(module, self.data)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the data module as it was."""
        self._loaded = 0
        if stage == "fit" and (data := getattr(trainer, "datamodule", None)) is not None:
            data.tasks_at = None


class _AfterCheckpoint(Checkpoint):
    """What is done after the end of an epoch is in ``last.ckpt``; Lightning calls callbacks of this kind last."""

    def __init__(self, stream: SequentialMerging) -> None:
        self._stream = stream

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Delete older stages; wait for more experts where the order grows."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        progress, folder = _progress(pl_module), run_dir(trainer)
        if trainer.is_global_zero:
            clean_stages(Path(folder), progress.absorbed, self._stream.keep)
        self._stream._look(trainer, pl_module)


def _count_passed_over(trainer: L.Trainer) -> None:
    """Count a batch that was passed over as started and completed.

    Lightning counts it as ready and processed only, and from then on takes no checkpoint in the middle of an epoch for
    what it is: a resumed epoch would have a step too many.
    """
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (progress.total, progress.current):
        counts.started, counts.completed = counts.ready, counts.processed


def _epochs_done(trainer: L.Trainer) -> int:
    current: Any = trainer.fit_loop.epoch_progress.current
    return int(current.processed)


def _progress(module: L.LightningModule) -> Progress:
    assert isinstance(module, MergeModule)
    assert module.progress is not None
    return module.progress
