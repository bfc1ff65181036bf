"""The predictions of a merge as a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from lit_merge.sinks import run_dir, save_rows

__all__ = ("write_predictions",)


def write_predictions(trainer: L.Trainer, outputs: Any) -> Path:  # noqa: ANN401 - nested as there are loaders
    """Write ``predictions.csv`` with task, position of the image and predicted class into the run's folder.

    Args:
        trainer: The trainer that predicted.
        outputs: What ``Trainer.predict`` returned on this rank.

    Returns:
        Path of the file, which has the predictions of all ranks in the order of the images.
    """
    rows: list[tuple[str, int, int]] = list(_rows(outputs or ()))
    if dist.is_available() and dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, rows)
        rows = [row for part in everyone for row in part]
    path = run_dir(trainer) / "predictions.csv"
    if trainer.is_global_zero:
        tasks = {task: number for number, task in enumerate(dict.fromkeys(row[0] for row in rows))}
        ordered = sorted(rows, key=lambda row: (tasks[row[0]], row[1]))
        save_rows(path, ["task", "index", "prediction"], ordered)
    return path


def _rows(outputs: Iterable[Any]) -> Iterator[tuple[str, int, int]]:
    for batch in outputs:
        if isinstance(batch, dict):
            pairs = zip(batch["index"].tolist(), batch["prediction"].tolist(), strict=True)
            yield from ((batch["task"], index, prediction) for index, prediction in pairs)
        else:
            yield from _rows(batch)
