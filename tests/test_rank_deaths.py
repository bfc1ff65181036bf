"""A rank that dies, or fails, ends the run on the others in seconds; the same command then goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import lightning as L
import pytest
import torch
from kills import _fork, _status
from rank_group import Fate, How, Moment, _join, ends, free_port, in_ranks
from ranks import ALL, odd, trainer

from lit_merge import AdaMerging, TaskDataModule, lost_ranks, main
from lit_merge.callbacks import CollapseMonitor, Report, ResumePoint


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


@pytest.mark.parametrize(
    ("rank", "moment", "how"),
    # that another rank than the first is killed in a step: see tests/test_model_parallel.py
    [(0, "step", "kill"), (0, "validation", "kill"), (1, "test", "kill"), (1, "step", "raise")],
)
def test_the_others_end_and_a_resumed_run_is_the_same(tmp_path: Path, rank: int, moment: Moment, how: How) -> None:
    ended = in_ranks(2, lambda _: fit(tmp_path, Fate(rank, moment, how)))
    assert ended[rank].status == (-signal.SIGKILL if how == "kill" else 1)
    assert ended[1 - rank].status not in (0, -signal.SIGKILL)
    assert ended[1 - rank].seconds - ended[rank].seconds < 30  # a second or two, on a machine with nothing else to do
    assert not (tmp_path / "report.json").exists()
    assert [each.status for each in in_ranks(2, lambda _: fit(tmp_path))] == [0, 0]
    assert left(tmp_path) == uninterrupted()


def test_a_busy_rank_ends_with_the_one_that_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # under the strategy ddp rank zero starts the others; busy ones notice nothing, as those that wait for NCCL
    monkeypatch.setattr(lost_ranks, "ParentWatch", partial(lost_ranks.ParentWatch, grace=0.2, period=0.05))
    port, fate = free_port(), Fate(0, "step", "kill", step=1, busy=True)

    def rank_zero() -> None:
        _fork(lambda: _join(1, 2, port, lambda _: said(tmp_path / "stderr", lambda: fit(tmp_path, fate))))
        _join(0, 2, port, lambda _: fit(tmp_path, fate))

    assert _status(_fork(rank_zero)) == -signal.SIGKILL
    assert ends(int((tmp_path / "pid-1").read_text()), 30)
    assert "error: rank 1 ends, because the rank that started it is gone\n" in (tmp_path / "stderr").read_text()


def said(path: Path, work: Any) -> None:
    """Do something with standard error in a file."""
    os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    work()


def test_the_error_that_counts_is_that_of_the_rank_that_failed(tmp_path: Path) -> None:
    arguments = [
        *("fit", "--config", "adamerging.yaml", "--suite", "toys.ToySuite", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--data.steps_per_epoch", "4"),
        *("--trainer.strategy", "ddp", "--trainer.devices", "2", "--trainer.callbacks+", "rank_group.Fate"),
        *("--trainer.callbacks.rank", "1", "--trainer.callbacks.moment", "step", "--trainer.callbacks.how", "raise"),
    ]
    os.chdir(tmp_path)
    ended = in_ranks(2, lambda rank: said(tmp_path / str(rank), lambda: main(arguments)))
    assert [each.status for each in ended] == [1, 1]
    zero, one = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert "error: this rank has a problem of its own\n" in one
    assert "error: another rank of this run has ended; if it does not say why, it was killed\n" in zero
    assert "gloo" not in zero.partition("error: ")[2].partition("Traceback")[0]
