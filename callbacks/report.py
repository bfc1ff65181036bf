"""The report of a run: table, report.json and loggers."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.table import Table

from lit_merge.callbacks._stream_score import StreamScore
from lit_merge.checkpoints.export import write_json
from lit_merge.module import MergeModule
from lit_merge.provenance import versions
from lit_merge.sinks import log_table, run_dir

__all__ = ("Report",)

_COLUMNS = {"base_accuracy": "base", "expert_accuracy": "expert", "accuracy": "merged", "normalized_accuracy": "norm."}


class Report(L.Callback):
    """After validation or test: a table in the terminal and in every logger, and ``report.json`` in the run's folder.

    Accuracies are fractions in [0, 1]; ``normalized_accuracy`` is accuracy / expert accuracy, averaged over tasks.
    Under the protocol ``online`` the accuracy is that of each image at its arrival, and ``final_accuracy`` that of
    the adapted network. Whatever callbacks and methods put into ``extra`` is reported too.

    Attributes:
        extra: Plain data for ``report.json`` → ``extra``.
    """

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {}
        self.content: dict[str, Any] = {}
        self._stream = StreamScore()
        self._seconds = 0.0
        self._started = 0.0
        self._steps = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int  # noqa: ANN401
    ) -> None:  # fmt: skip
        """Count steps, and score the images of a stream as they arrive."""
        self._steps = trainer.global_step
        if _protocol(trainer) == "online":
            self._stream.update(outputs)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count the rest of a stream, and stop the clock."""
        self._stream.settle(trainer)
        self._seconds += time.monotonic() - self._started
        self._started = 0.0

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report."""
        self._report(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, outside of a fit."""
        if trainer.state.fn == "validate":
            self._started = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report, outside of a fit."""
        if trainer.state.fn == "validate":
            self._report(trainer, pl_module)

    def _report(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        if not isinstance(model, MergeModule) or not model.results.get("tasks"):
            return
        results = self._stream.applied(trainer, model.results)
        folder = run_dir(trainer)
        extra = {key: results[key] for key in ("unseen",) if key in results} | model.report_extra() | self.extra
        if lost := model.bank.storage_report():
            extra["storage"] = lost
        self.content = {
            "schema": 1,
            "method": type(model).__name__,
            "suite": model.suite.name,
            "protocol": _protocol(trainer),
            "seed": int(os.environ.get("PL_GLOBAL_SEED", "0")),
            "versions": versions(),
            "seconds": round(self._seconds + time.monotonic() - self._started, 3),
            "peak_memory_bytes": _peak_memory(),
            "tasks": results["tasks"],
            "mean": results["mean"],
            "extra": {"adaptation_seconds": round(self._seconds, 3), "steps": self._steps, **extra},
        }
        if trainer.is_global_zero:
            self._publish(trainer, folder)

    def _publish(self, trainer: L.Trainer, folder: Path) -> None:
        rows = [*self.content["tasks"].items(), ("mean", self.content["mean"])]
        if unseen := self.content["extra"].get("unseen"):
            rows += [*unseen["tasks"].items(), ("mean of unseen", unseen["mean"])]
        cells: list[list[str | float]] = [
            [name, *(float(row.get(key, float("nan"))) for key in _COLUMNS)] for name, row in rows
        ]
        Console().print("{method} on {suite} ({protocol}, seed {seed})".format(**self.content), highlight=False)
        Console().print(_table(cells))
        log_table(trainer, "report", ["task", *_COLUMNS.values()], cells)
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_json(folder / "report.json", self.content)
            Console().print(f"report: {folder / 'report.json'}", soft_wrap=True, highlight=False)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run has to remember."""
        running = time.monotonic() - self._started if self._started else 0.0
        return {"seconds": self._seconds + running, "steps": self._steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what was remembered."""
        self._seconds, self._steps = state_dict["seconds"], state_dict["steps"]

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember the score of a stream; rank zero writes the checkpoint, so it has the counts of all ranks."""
        checkpoint["lit_merge_stream"] = self._stream.total(trainer)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with the score of a stream."""
        self._stream.load(trainer, checkpoint.get("lit_merge_stream", {}))


def _table(cells: list[list[str | float]]) -> Table:
    table = Table()
    table.add_column("task")
    for column in _COLUMNS.values():
        table.add_column(column, justify="right")
    for row in cells:
        if row[0] in ("mean", "mean of unseen"):
            table.add_section()
        table.add_row(
            str(row[0]), *("-" if value != value else f"{100 * float(value):.1f}" for value in row[1:]),
            end_section=row[0] == "mean",
        )  # fmt: skip
    return table


def _protocol(trainer: L.Trainer) -> str:
    return str(getattr(getattr(trainer, "datamodule", None), "protocol", "custom"))


def _peak_memory() -> int:
    """Bytes: of the accelerator if there is one in use, else the largest resident set of this process, if known."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
