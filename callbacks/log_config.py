"""The parsed config of a run, in its folder and in every logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_merge.callbacks._sinks import run_dir
from lit_merge.checkpoints.atomic import atomic_path

__all__ = ("LogConfig",)


class LogConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder and send it to W&B; the command line installs it.

    Unlike Lightning's own callback it takes two W&B runs in one folder, a resumed run, and a run without a logger.

    Args:
        *args: See ``SaveConfigCallback``.
        **kwargs: See ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self._folder = Path()

    def text(self) -> str:
        """Return the config as YAML."""
        return str(self.parser.dump(self.config, skip_none=False))

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Save once per process, on all stages' first."""
        if self.already_saved:
            return
        self.already_saved = True
        self._folder = run_dir(trainer)
        if trainer.is_global_zero:
            self.save_config(trainer, pl_module, stage)

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write the file, and tell W&B; called on rank zero."""
        with atomic_path(self._folder / "config.yaml") as temporary:
            temporary.write_text(self.text())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": self.config.as_dict()})
