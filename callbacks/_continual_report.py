"""What a stream of experts came to: report, table, loggers and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from lit_merge.callbacks.coefficient_monitor import canvas
from lit_merge.functional.continual_metrics import continual_metrics
from lit_merge.module import MergeModule
from lit_merge.sinks import log_image, log_staged, log_table, save_rows

__all__ = ("draw", "log_stage", "publish", "summary")

Row = list[float | None]


def summary(module: MergeModule, data: str) -> dict[str, Any]:
    """Return what ``report.json`` → ``extra`` → ``continual`` says.

    Args:
        module: The merge, in a stream.
        data: Whose images a stage adapts on.

    Returns:
        ``order``, ``stages``, ``tasks`` (the columns of the matrix: those that were merged, in their order, then the
        others that were scored), ``matrix``: accuracy after each stage, null where a task was not scored,
        ``base_accuracy``, ``expert_accuracy``, ``metrics``, and ``removal``: what taking each expert out again would
        need. Plain data.
    """
    progress = module.progress
    assert progress is not None
    history = progress.history
    scored = {task for stage in progress.stages for task in stage["accuracies"]}
    tasks = [*history, *(task for task in module.suite.tasks if task in scored and task not in history)]
    matrix: list[Row] = [[stage["accuracies"].get(task) for task in tasks] for stage in progress.stages]
    base, experts = (
        [None if task not in hits else hits[task][0] / max(1, hits[task][1]) for task in tasks]
        for hits in (progress.base, progress.experts)
    )
    return {
        "order": list(history),
        "ordering": progress.ordering,
        "seed": progress.seed if progress.ordering == "shuffle" else None,
        "data": data if module.learnable else "none",
        "stages": progress.stages,
        "tasks": tasks,
        "matrix": matrix,
        "base_accuracy": base,
        "expert_accuracy": experts,
        "metrics": _metrics(matrix, base, experts) if scored else {},
        "removal": {task: _removal(module, task) for task in history},
    }


def _removal(module: MergeModule, task: str) -> dict[str, Any]:
    assert module.progress is not None
    found = module.removal(task, module.progress.history, module.progress.numbers)
    return {"exact": found.exact, "needs": list(found.needs), "how": found.how}


def _metrics(matrix: list[Row], base: Row, experts: Row) -> dict[str, Any]:
    """Return the metrics of continual learning after each stage; null where one is undefined."""
    if any(None in row[: number + 1] for number, row in enumerate(matrix)):
        return {}  # a part of the stream was not scored
    columns = len(matrix)  # forward transfer needs no more than the tasks that have come
    found = continual_metrics(
        [_numbers(row[:columns]) for row in matrix], _numbers(base[:columns]), _numbers(experts[:columns])
    )
    return {
        name: [None if value != value else value for value in values.tolist()]
        for name, values in found._asdict().items()
    }


def log_stage(trainer: L.Trainer, content: dict[str, Any]) -> None:
    """Send the newest stage to the loggers, with the number of the stage as x-axis.

    Args:
        trainer: Has the loggers.
        content: See :func:`summary`.
    """
    number, newest = len(content["stages"]), content["stages"][-1]
    values = {f"accuracy/{task}": value for task, value in newest["accuracies"].items()}
    values |= {key: value for key, value in newest["numbers"].items() if isinstance(value, int | float)}
    for key, value in content["metrics"].items():
        last = value[-1] if isinstance(value, list) and value else value
        values |= {key: last} if isinstance(last, int | float) else {}
    log_staged(trainer, "continual", number, {key: float(value) for key, value in values.items()})


def publish(trainer: L.Trainer, folder: Path, content: dict[str, Any]) -> None:
    """Show the matrix in the terminal and the loggers.

    Args:
        trainer: Has the loggers.
        folder: Where ``continual-matrix.csv`` goes.
        content: See :func:`summary`.
    """
    if not any(stage["accuracies"] for stage in content["stages"]):
        return
    tasks, order = content["tasks"], content["order"]
    table = Table(title="accuracy after each stage")
    table.add_column("stage")
    for task in tasks:
        table.add_column(task, justify="right")
    rows = [("base", content["base_accuracy"]), *zip(order, content["matrix"], strict=True)]
    for name, values in [*rows, ("expert", content["expert_accuracy"])]:
        table.add_row(name, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    Console().print(table)
    cells = [
        [number, name, *_numbers(row)]
        for number, (name, row) in enumerate(zip(order, content["matrix"], strict=True), 1)
    ]
    save_rows(folder / "continual-matrix.csv", ["stage", "task", *tasks], cells)
    log_table(trainer, "continual/matrix", ["stage", "task", *tasks], cells)


def draw(trainer: L.Trainer, folder: Path, content: dict[str, Any]) -> None:
    """Draw ``continual-matrix.png`` and ``continual-accuracy.png``, and show them to the loggers.

    Args:
        trainer: Has the loggers.
        folder: Where to.
        content: See :func:`summary`.
    """
    if not any(stage["accuracies"] for stage in content["stages"]):
        return
    _draw_matrix(folder / "continual-matrix.png", content["matrix"], content["order"], content["tasks"])
    _draw_curves(folder / "continual-accuracy.png", content["matrix"], content["tasks"])
    for name in ("matrix", "accuracy"):
        log_image(trainer, f"continual/{name}", folder / f"continual-{name}.png")


def _numbers(row: Row) -> list[float]:
    return [float("nan") if value is None else value for value in row]


def _draw_matrix(path: Path, matrix: list[Row], order: Sequence[str], tasks: Sequence[str]) -> None:
    """Heat map of the accuracies: one row per stage, one column per task."""
    with canvas(path, (0.6 * len(tasks) + 2.5, 0.4 * len(order) + 2.0)) as axes:
        image = axes.imshow([_numbers(row) for row in matrix], vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        for y, row in enumerate(matrix if len(order) * len(tasks) <= 400 else ()):
            for x, value in enumerate(row):
                if value is not None:
                    color = "black" if value > 0.6 else "white"
                    axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_yticks(range(len(order)), [f"{number} {task}" for number, task in enumerate(order, 1)], fontsize=8)
        axes.set_xticks(range(len(tasks)), tasks, rotation=90, fontsize=8)
        axes.set_ylabel("after stage")
        axes.figure.colorbar(image, ax=axes, label="accuracy")


def _draw_curves(path: Path, matrix: list[Row], tasks: Sequence[str]) -> None:
    """Accuracy of every task over the stages."""
    with canvas(path, (6.0, 4.0)) as axes:
        stages = range(1, len(matrix) + 1)
        for number, task in enumerate(tasks):
            axes.plot(stages, _numbers([row[number] for row in matrix]), marker="o", markersize=3, label=task)
        means = [[value for value in row if value is not None] for row in matrix]
        average = [sum(row) / len(row) if row else float("nan") for row in means]
        axes.plot(stages, average, color="black", linewidth=2.5, label="mean of the scored")
        axes.set_xlabel("stage")
        axes.set_ylabel("accuracy")
        axes.set_xticks(list(stages)[:: max(1, len(matrix) // 20)])
        axes.set_ylim(0, 1.02)
        axes.legend(fontsize=6, ncols=2)
