"""A CSV logger for runs that go on."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lit_merge.checkpoints.atomic import atomic_path

__all__ = ("RunLogger",)


class RunLogger(CSVLogger):
    """Lightning's CSVLogger, which goes on with the ``metrics.csv`` of a resumed run instead of deleting it.

    Steps that were logged after the last checkpoint, and so are taken once more, have one row: the later one.

    Args:
        save_dir: Folder of all runs.
        name: Folder of these runs, below it.
        version: Number or name of the run; by default the next free number.
        prefix: Put before the name of each metric.
        flush_logs_every_n_steps: How often the file is written.
    """

    def __init__(
        self,
        save_dir: str | Path = "runs",
        name: str | None = "lit-merge",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix, flush_logs_every_n_steps)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of this run's files."""
        if not isinstance(self._experiment, _RunWriter):
            self._experiment = _RunWriter(self.log_dir)
        return self._experiment


class _RunWriter(ExperimentWriter):
    """Holds all rows of the run, and writes them whole or not at all."""

    def __init__(self, log_dir: str) -> None:
        self._rows: dict[tuple[str, frozenset[str]], dict[str, Any]] = {}
        super().__init__(log_dir)

    def _check_log_dir_exists(self) -> None:
        """Read what is there; Lightning would delete it."""
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                for row in csv.DictReader(file):
                    self._put({key: value for key, value in row.items() if value})

    def _put(self, row: dict[str, Any]) -> None:
        self._rows[str(row["step"]), frozenset(row)] = row

    def save(self) -> None:
        """Write the file."""
        if not self.metrics:
            return
        for row in self.metrics:
            self._put(row)
        self.metrics = []
        with atomic_path(self.metrics_file_path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, sorted(set().union(*self._rows.values())))
            writer.writeheader()
            writer.writerows(self._rows.values())
