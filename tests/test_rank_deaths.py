"""A rank that dies, or fails, ends the run on the others in seconds; the same command then goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

import lightning as L
import pytest
import torch
from rank_group import Ended, in_ranks
from ranks import ALL, odd, trainer

from lit_merge import AdaMerging, TaskDataModule
from lit_merge.callbacks import CollapseMonitor, Report, ResumePoint

Moment = Literal["step", "validation", "test"]
How = Literal["kill", "raise"]


class Fate(L.Callback):
    """What happens to one rank."""

    def __init__(self, rank: int, moment: Moment, how: How) -> None:
        self.rank, self.moment, self.how = rank, moment, how

    def _now(self, trainer: L.Trainer, moment: Moment) -> None:
        if (trainer.global_rank, moment) != (self.rank, self.moment):
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("this rank has a problem of its own")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            self._now(trainer, "step")

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step >= 3:
            self._now(trainer, "validation")

    def on_test_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._now(trainer, "test")


def fit(folder: Path, *more: L.Callback) -> None:
    """What the command does, on one of two ranks."""
    suite = odd()
    callbacks = [Report(), CollapseMonitor(2), ResumePoint(1), *more]
    engine = trainer(folder, 2, max_epochs=2, callbacks=callbacks, strategy="ddp", num_sanity_val_steps=0)
    model = AdaMerging(suite=suite, objective=ALL, optimizer=partial(torch.optim.Adam, lr=0.01))
    data = TaskDataModule(suite, batch_size=2, eval_batch_size=5, steps_per_epoch=3, seed=3)
    engine.fit(model, datamodule=data, ckpt_path="last")
    engine.test(model, datamodule=data, verbose=False)
    if engine.is_global_zero:
        torch.save(model.coefficients.detach(), folder / "coefficients.pt")


def left(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "report.json").read_text())
    bits = torch.load(folder / "coefficients.pt").tolist()
    return {"coefficients": bits, **{key: report[key] for key in ("tasks", "mean", "protocol")}}


@cache
def uninterrupted() -> dict[str, Any]:
    folder = Path(mkdtemp())
    assert [each.status for each in in_ranks(2, lambda _: fit(folder))] == [0, 0]
    return left(folder)


def group(folder: Path, fate: Fate) -> list[Ended]:
    return in_ranks(2, lambda _: fit(folder, fate))


@pytest.mark.parametrize(
    ("rank", "moment", "how"),
    [(0, "step", "kill"), (1, "step", "kill"), (0, "validation", "kill"), (1, "test", "kill"), (1, "step", "raise")],
)  # fmt: skip
def test_the_others_end_and_a_resumed_run_is_the_same(tmp_path: Path, rank: int, moment: Moment, how: How) -> None:
    ended = group(tmp_path, Fate(rank, moment, how))
    assert ended[rank].status == (-signal.SIGKILL if how == "kill" else 1)
    assert ended[1 - rank].status not in (0, -signal.SIGKILL)
    assert ended[1 - rank].seconds - ended[rank].seconds < 10
    assert not (tmp_path / "report.json").exists()
    assert [each.status for each in in_ranks(2, lambda _: fit(tmp_path))] == [0, 0]
    assert left(tmp_path) == uninterrupted()
