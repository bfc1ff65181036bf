"""Runs that are killed, and what they should have come to."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import lightning as L
import torch
from toys import Kind, ToySuite

from lit_merge import AdaMerging, MergeTrainer, TaskDataModule
from lit_merge.callbacks import CollapseMonitor, Report, ResumePoint
from lit_merge.objectives import Diversity, Entropy, ExpertAlignment, Objective, WeightedSum
from lit_merge.suites import Suite
from lit_merge.transforms import Ties

EPOCHS, STEPS = 3, 5
When = Literal["start", "end", "validation", "epoch_end", "before_save", "in_save", "after_save"]


@dataclass(frozen=True)
class Case:
    """What is trained."""

    kind: Kind = "cnn"
    workers: int = 0
    experts: bool = False
    scheduler: bool = False
    accumulate: int = 1
    protocol: Literal["transductive", "split", "online"] = "transductive"
    every: int = 2
    ties: bool = False
    steps: int | None = None  # the run is limited by steps, not epochs

    def model(self, suite: Suite | None = None, **kwargs: Any) -> AdaMerging:
        objective: Objective = Entropy()
        if self.experts:
            objective = WeightedSum([Entropy(), ExpertAlignment("kl"), Diversity()], [0.5, 1.0, 0.1])
        options: dict[str, Any] = {
            "objective": objective,
            "optimizer": partial(torch.optim.Adam, lr=0.01),
            "scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=4, gamma=0.7) if self.scheduler else None,
            "transforms": [Ties()] if self.ties else None,
        }
        return AdaMerging(suite=suite or ToySuite(self.kind), granularity="tensor", **{**options, **kwargs})

    def data(self, suite: Suite, **kwargs: Any) -> TaskDataModule:
        options: dict[str, Any] = {"steps_per_epoch": STEPS, "num_workers": self.workers, "protocol": self.protocol}
        return TaskDataModule(**{"suite": suite, "batch_size": 4, "seed": 1, **options, **kwargs})

    def trainer(self, root: Path, callbacks: list[L.Callback] | None = None, **kwargs: Any) -> MergeTrainer:
        options: dict[str, Any] = {
            "max_epochs": 1 if self.protocol == "online" else -1 if self.steps else EPOCHS,
            "max_steps": self.steps or -1,
            "accumulate_grad_batches": self.accumulate,
            "limit_val_batches": 0 if self.workers else None,  # six more processes each time
            "callbacks": [Report(), CollapseMonitor(every_n_steps=3), ResumePoint(self.every), *(callbacks or [])],
            **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"},
        }
        return MergeTrainer(default_root_dir=root, **{**options, **kwargs})


class Kill(L.Callback):
    """Kills its own process at the n-th moment of a kind; there is no clean-up and no goodbye."""

    def __init__(self, when: When, number: int) -> None:
        self.when = when
        self.left = number

    def _now(self, when: When) -> None:
        self.left -= when == self.when
        if when == self.when and self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        save = trainer.save_checkpoint

        def watched(*args: Any, **kwargs: Any) -> None:
            self._now("before_save")
            if self.when == "in_save" and self.left == 1:
                self._tear()
            self.left -= self.when == "in_save"
            save(*args, **kwargs)

        trainer.save_checkpoint = watched  # type: ignore[method-assign]

    def _tear(self) -> None:
        """Let temporary files be on another disk, and die when half of the file is copied from there."""

        def rename(*_: Any) -> None:
            raise OSError(18, "Invalid cross-device link")

        def copy(source: str, target: str, **_: Any) -> None:
            content = Path(source).read_bytes()
            Path(target).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        os.rename, shutil.copyfile = rename, copy  # type: ignore[assignment] # in a process that dies soon

    def on_train_batch_start(self, *_: Any) -> None:
        self._now("start")

    def on_train_batch_end(self, *_: Any) -> None:
        self._now("end")

    def on_validation_batch_end(self, *_: Any) -> None:
        self._now("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._now("epoch_end")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        point = next(c for c in trainer.callbacks if isinstance(c, ResumePoint))  # type: ignore[attr-defined]
        save = point._save

        def watched(trainer: L.Trainer) -> None:
            save(trainer)
            self._now("after_save")

        point._save = watched  # type: ignore[method-assign]


def _fork(work: Callable[[], object]) -> int:
    """Start something in a fork, and return the fork's id."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)  # whatever happens, no second pytest goes on
    return child


def _status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def in_child(work: Callable[[], object], deadline: float | None = None) -> int:
    """Run something in a fork; returns 0 or 1, or minus the signal that ended it. ``deadline`` kills it in time."""
    child = _fork(work)
    if deadline is not None:
        time.sleep(deadline)
        os.kill(child, signal.SIGKILL)
    return _status(child)


def side_by_side(jobs: Sequence[Callable[[], object]]) -> None:
    """Run independent jobs in two forks, one after another in each; what goes wrong there is an error here."""
    children = [_fork(lambda share=share: [job() for job in share]) for share in (jobs[::2], jobs[1::2])]  # type: ignore[misc]
    assert [_status(child) for child in children] == [0, 0], "a job failed; its traceback is on standard error"


def fit(case: Case, root: Path, kill: Kill | None = None) -> None:
    """One run of the same command; the end of it is written to a file."""
    model = case.model()
    data = case.data(model.suite)
    trainer = case.trainer(root, [kill] if kill else [])
    trainer.fit(model, datamodule=data, ckpt_path="last")
    data.num_workers = 0
    trainer.test(model, datamodule=data, verbose=False)
    torch.save(
        {
            "coefficients": model.coefficients.detach(),
            "steps": trainer.global_step,
            "rate": trainer.optimizers[0].param_groups[0]["lr"] if trainer.optimizers else None,
        },
        root / "final.pt",
    )


def final(root: Path) -> dict[str, Any]:
    return {**torch.load(root / "final.pt"), "report": report(root)}


def report(root: Path) -> dict[str, Any]:
    content = json.loads((root / "report.json").read_text())
    return {key: content[key] for key in ("method", "protocol", "tasks", "mean")}


@cache
def uninterrupted(case: Case) -> dict[str, Any]:
    root = Path(mkdtemp())
    fit(case, root)  # in this process: it warms up what the forks inherit
    return final(root)


def check(case: Case, root: Path) -> None:
    """Run to the end and compare every bit."""
    expected = uninterrupted(case)
    assert in_child(lambda: fit(case, root)) == 0
    got = final(root)
    assert torch.equal(got["coefficients"], expected["coefficients"])
    assert (got["steps"], got["report"]) == (expected["steps"], expected["report"])
    assert not torch.equal(got["coefficients"], torch.full_like(got["coefficients"], 0.3))
