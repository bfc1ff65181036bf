"""The parsed config of a run, in its folder and in every logger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import Namespace
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger

from lit_merge.checkpoints.atomic import atomic_path
from lit_merge.sinks import run_dir

__all__ = ("LogConfig",)

_SHARED = ("seed_everything", "trainer", "suite", "model", "data")


class LogConfig(SaveConfigCallback):
    """Write ``config.yaml`` into the run's folder and send it to W&B; the command line installs it.

    Unlike Lightning's own callback it takes two W&B runs in one folder, a resumed run, and a run without a logger.

    A later evaluation of a checkpoint in the folder of its fit leaves the config of the fit as it is.

    Args:
        *args: See ``SaveConfigCallback``.
        asked: The config before ``--ckpt_path last`` was resolved, which can be given to another run.
        **kwargs: See ``SaveConfigCallback``.
    """

    def __init__(self, *args: Any, asked: Namespace | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})
        self._asked = self.config if asked is None else asked
        self._folder = Path()
        self._text = ""

    def text(self) -> str:
        """Return the config as YAML; what only one subcommand knows is left out unless it was given."""
        if self._text:  # a dump takes a tenth of a second, and a run asks for it several times
            return self._text
        config = self._asked.clone()
        for key in [key for key in vars(config) if key not in _SHARED]:
            if config[key] == self.parser.get_default(key):
                del config[key]
        self._text = str(self.parser.dump(config, skip_none=False))
        return self._text

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
        checkpoint = self.config.get("ckpt_path")
        if stage == "fit" or checkpoint is None or Path(checkpoint).parent != self._folder:
            with atomic_path(self._folder / "config.yaml") as temporary:
                temporary.write_text(self.text())
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_hyperparams({"config": self.config.as_dict()})
