"""Write the merged network when adaptation ends."""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lit_merge.checkpoints.export import write_card
from lit_merge.exporting import ExportFormat, card_of, export_merge
from lit_merge.module import MergeModule
from lit_merge.sinks import log_file, run_dir

__all__ = ("ExportMerge",)


class ExportMerge(L.Callback):
    """Write the merged network, which loads without lit-merge, ``merge.json`` and a model card.

    The card gets its scores when the network is evaluated after the fit; put :class:`Report` before this callback.

    Args:
        folder: Where to; by default the folder ``export`` of the run.
        format: ``safetensors``, ``hugging_face`` or ``open_clip``, see :func:`lit_merge.exporting.export_merge`.
    """

    def __init__(self, folder: str | Path | None = None, format: ExportFormat = "safetensors") -> None:
        self.folder = None if folder is None else Path(folder)
        self.format: ExportFormat = format
        self._written: Path | None = None
        self._exported = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export; with W&B also as an artifact."""
        self._export(trainer, pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export if that is all that is missing: the run was killed after its last checkpoint."""
        there = ((self.folder or run_dir(trainer) / "export") / "README.md").is_file()  # the card comes last
        if isinstance(pl_module, MergeModule) and pl_module.progress is not None:
            there = False  # it may be that of a shorter stream
        if not trainer.strategy.broadcast(self._exported or there):
            self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = self.folder or run_dir(trainer) / "export"
        if not isinstance(pl_module, MergeModule) or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._exported = True
        pl_module.prepare_evaluation()
        state = pl_module.merged_state() if trainer.is_global_zero or pl_module.bank.storage.shared else None
        if trainer.is_global_zero:
            export_merge(folder, trainer, pl_module, self.format, state=state)
            self._written = folder
            log_file(trainer, f"{pl_module.suite.name}-{type(pl_module).__name__}".lower(), "merge", folder)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the scores into the card."""
        if self._written is not None and isinstance(pl_module, MergeModule):
            write_card(self._written, card_of(trainer, pl_module, self.format))
