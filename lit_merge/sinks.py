"""Where a run's files go, and the only place that knows one logger from another."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import lightning as L
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from lit_merge.checkpoints.atomic import atomic_path

__all__ = ("log_file", "log_image", "log_staged", "log_table", "run_dir", "save_rows")

Cell = str | float | int


def run_dir(trainer: L.Trainer) -> Path:
    """Folder of this run, the same on all ranks: the first logger's, or ``default_root_dir`` without a logger.

    Two W&B runs in one ``save_dir`` have two folders.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return _folder(trainer)  # before the processes of a strategy meet, each has to see for itself
    path = str(_folder(trainer)) if trainer.is_global_zero else ""
    return Path(trainer.strategy.broadcast(path))


def _folder(trainer: L.Trainer) -> Path:
    logger = trainer.logger
    if isinstance(logger, CSVLogger | TensorBoardLogger):
        return Path(logger.log_dir)
    if isinstance(logger, WandbLogger):
        _ = logger.experiment  # the run's id exists from here on
        return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / str(logger.version)
    return Path(trainer.default_root_dir)


def log_table(trainer: L.Trainer, key: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Send a table to every logger: W&B table, TensorBoard text, CSV file."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(key, columns=list(columns), data=[list(row) for row in rows])
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(key, _markdown(columns, rows), trainer.global_step)
        elif isinstance(logger, CSVLogger):
            save_rows(Path(logger.log_dir) / f"{key.replace('/', '-')}.csv", columns, rows)


def log_image(trainer: L.Trainer, key: str, path: Path) -> None:
    """Send a PNG file to the loggers that show images."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [str(path)])
        elif isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            logger.experiment.add_image(key, imread(path)[..., :3], trainer.global_step, dataformats="HWC")


def log_staged(trainer: L.Trainer, prefix: str, stage: int, values: Mapping[str, float]) -> None:
    """Send numbers to every logger with the number of a stage as their x-axis.

    Args:
        trainer: Has the loggers.
        prefix: Of the names; ``prefix/stage`` is logged beside them.
        stage: The number.
        values: Numbers by name.
    """
    metrics = {f"{prefix}/{key}": value for key, value in values.items()}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_metrics(metrics, stage)
            continue
        if isinstance(logger, WandbLogger) and _is_live(logger):
            logger.experiment.define_metric(f"{prefix}/*", step_metric=f"{prefix}/stage")
        logger.log_metrics({**metrics, f"{prefix}/stage": float(stage)}, trainer.global_step)


def log_file(trainer: L.Trainer, name: str, kind: str, folder: Path) -> None:
    """Send a folder to the loggers that keep artifacts."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger) and _is_live(logger):
            import wandb

            artifact = wandb.Artifact(name, type=kind)
            artifact.add_dir(str(folder))
            logger.experiment.log_artifact(artifact)


def _is_live(logger: WandbLogger) -> bool:
    return not getattr(logger.experiment, "disabled", False)


def save_rows(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
    """Write a CSV file at once."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows])


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(f"{c:.4f}" if isinstance(c, float) else str(c) for c in line) + " |"
                     for line in lines)  # fmt: skip
