"""Write the merged network when adaptation ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lit_merge.checkpoints.export import write_merged
from lit_merge.module import MergeModule
from lit_merge.provenance import provenance
from lit_merge.sinks import log_file, run_dir

__all__ = ("ExportMerge",)


class ExportMerge(L.Callback):
    """Write ``merged.safetensors``, which loads into the plain network without lit-merge, and ``merge.json``.

    Args:
        folder: Where to; by default the folder ``export`` of the run.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export; with W&B also as an artifact."""
        folder = self.folder or run_dir(trainer) / "export"
        if not isinstance(pl_module, MergeModule) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        pl_module.prepare_evaluation()
        state = pl_module.merged_state()
        if trainer.is_global_zero:
            write_merged(folder, state, provenance(trainer, pl_module))
            log_file(trainer, f"{pl_module.suite.name}-{type(pl_module).__name__}".lower(), "merge", folder)
