"""Pictures and tables of learned coefficients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from lit_merge.errors import require
from lit_merge.module import MergeModule
from lit_merge.sinks import log_image, run_dir, save_rows

__all__ = ("CoefficientMonitor",)


class CoefficientMonitor(L.Callback):
    """Write ``coefficients.csv`` and the heat map ``coefficients.png`` (tasks × tensors), and show the map to loggers.

    Methods without coefficients (:meth:`~lit_merge.MergeModule.coefficient_table`) are left alone.

    Args:
        every_n_epochs: How often while adapting; the end always has one.
    """

    def __init__(self, every_n_epochs: int = 5) -> None:
        self.every_n_epochs = every_n_epochs

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the mean coefficient per task, and now and then the map."""
        if not isinstance(pl_module, MergeModule) or (table := pl_module.coefficient_table()) is None:
            return
        if pl_module.adopting:
            return
        means = zip(pl_module.bank.tasks, table.mean(1).tolist(), strict=True)
        pl_module.log_dict({f"coefficients/{task}": value for task, value in means}, sync_dist=False)
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module, table)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write table and map."""
        if isinstance(pl_module, MergeModule) and (table := pl_module.coefficient_table()) is not None:
            self._draw(trainer, pl_module, table)

    def _draw(self, trainer: L.Trainer, pl_module: MergeModule, table: Tensor) -> None:
        folder = run_dir(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        tasks, names = pl_module.bank.tasks, pl_module.bank.names
        rows = [[name, *values] for name, values in zip(names, table.T.tolist(), strict=True)]
        save_rows(folder / "coefficients.csv", ["tensor", *tasks], rows)
        draw_heat_map(folder / "coefficients.png", table.cpu(), tasks, names)
        log_image(trainer, "coefficients", folder / "coefficients.png")


def draw_heat_map(path: Path, table: Tensor, tasks: tuple[str, ...], names: tuple[str, ...]) -> None:
    """Draw coefficients ``(T, L)`` as a heat map, one row per task.

    Args:
        path: PNG file.
        table: The coefficients.
        tasks: Names of the rows.
        names: Names of the columns; about forty of them are written.
    """
    size = max(6.0, 0.12 * len(names) + 2), 0.35 * len(tasks) + 2.5
    bound = max(float(table.abs().max()), 1e-6)
    with canvas(path, size) as axes:
        image = axes.imshow(
            table.numpy(), aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound, interpolation="nearest"
        )
        axes.set_yticks(range(len(tasks)), tasks)
        step = max(1, -(-len(names) // 40))
        axes.set_xticks(range(0, len(names), step), names[::step], rotation=90, fontsize=6)
        axes.figure.colorbar(image, ax=axes, label="coefficient")


@contextmanager
def canvas(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Give axes to draw on, and write the picture when the block ends.

    Args:
        path: PNG file; its folder is made if missing.
        size: Width and height in inches.
    """
    require("matplotlib", "demo")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)  # without pyplot: no global state, no display
    yield figure.add_subplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
