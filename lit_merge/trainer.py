"""MergeTrainer: Lightning's Trainer with merge and export."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lit_merge.checkpoints.export import write_card
from lit_merge.checkpoints.model_card import model_card
from lit_merge.checkpoints.reading import read_checkpoint
from lit_merge.data.steps import Steps
from lit_merge.encoders.json_files import read_json
from lit_merge.errors import MergeError
from lit_merge.exporting import ExportFormat, export_merge
from lit_merge.module import MergeModule
from lit_merge.provenance import provenance
from lit_merge.sinks import run_dir
from lit_merge.streaming import stream_suite, why_not_streamed

__all__ = ("MergeTrainer",)


class MergeTrainer(L.Trainer):
    """A Trainer that also merges without training, and exports; its arguments are those of ``lightning.Trainer``."""

    def fit(
        self,
        model: L.LightningModule,
        train_dataloaders: Any = None,  # noqa: ANN401
        val_dataloaders: Any = None,  # noqa: ANN401
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Adapt a merge at test time, or merge a stream of experts.

        A method that learns nothing says so and is left as it is, unless the experts come one by one, see
        :class:`~lit_merge.callbacks.SequentialMerging`.

        Args:
            model: The merge.
            train_dataloaders: Unlabelled batches, if there is no data module.
            val_dataloaders: Labelled batches, if there is no data module.
            datamodule: A :class:`~lit_merge.TaskDataModule`, or one of your own.
            ckpt_path: Checkpoint to resume from; ``last``: that of this run's folder, or a fresh start if there is
                none.
            weights_only: See ``lightning.Trainer.fit``.
        """
        still = isinstance(model, MergeModule) and not model.learnable
        if still and not self.has_stream:
            rank_zero_info(f"{type(model).__name__} has nothing to learn: there is no fit, only evaluation")
            return
        # lightning 2.6 takes a run that is limited by max_steps for one in the middle of an epoch whenever it resumes,
        # also after the end of one, and would drop the rest of the next epoch
        self.fit_loop._iteration_based_training = lambda: False  # type: ignore[method-assign]
        if ckpt_path == "last":
            last = run_dir(self) / "last.ckpt"
            ckpt_path = last if last.is_file() else None
        if still and train_dataloaders is None and datamodule is None:
            train_dataloaders = Steps(1)
        if self.has_stream and isinstance(model, MergeModule):
            model.enter_stream()  # here too, if the fit is in processes of its own
        with warnings.catch_warnings():
            if self.has_stream:  # epochs without a step
                warnings.filterwarnings("ignore", ".*(run with no optimizer|before `optimizer.step).*")
            try:
                super().fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
            except torch.OutOfMemoryError as error:
                from lit_merge.hints import memory_hint

                error.add_note(memory_hint())
                raise
        if isinstance(model, MergeModule) and model.progress is not None and self.strategy.launcher is not None:
            last = run_dir(self) / "last.ckpt"
            if not model.progress.absorbed and last.is_file():  # a fork brings back what was learned, but no stages
                _load(model, last)

    @property
    def has_stream(self) -> bool:
        """Whether the callback :class:`~lit_merge.callbacks.SequentialMerging` is there."""
        from lit_merge.callbacks.sequential_merging import SequentialMerging

        return any(isinstance(callback, SequentialMerging) for callback in self.callbacks)  # type: ignore[attr-defined]

    def merge(
        self,
        model: MergeModule,
        datamodule: L.LightningDataModule | None = None,
        output: str | Path | None = None,
        format: ExportFormat = "safetensors",
    ) -> Path:
        """Merge with a data-free method, evaluate the result and export it; or weights alone: merge --base DIR --help.

        Without an evaluation the merge goes piece by piece where the rule allows, see :mod:`lit_merge.streaming`, in
        the memory of its largest tensor.

        Args:
            model: The merge.
            datamodule: Where to evaluate; without one there is no evaluation.
            output: Folder to export into; by default the folder ``export`` of the run.
            format: ``safetensors``, ``hugging_face`` or ``open_clip``, see :func:`lit_merge.exporting.export_merge`.

        Returns:
            Path of the merged weights.

        Raises:
            MergeError: The method learns; it has to be fitted.
        """
        if model.learnable:
            raise MergeError(f"{type(model).__name__} learns its merge; use `fit`, which exports it, or `export`")
        if self.has_stream:
            self.fit(model, datamodule=datamodule)
        if datamodule is not None:
            rank_zero_info(
                "merging in memory, beside the base and the experts that are scored; --data null only merges"
            )
            self.test(model, datamodule=datamodule, verbose=False)
            return self.export(model, datamodule, output=output, format=format)
        if self.has_stream:
            reason: str | None = "the experts come one by one"
        elif format != "safetensors":
            reason = f"format: {format} is written from a network in memory"
        else:
            reason = why_not_streamed(model)
        if reason is not None:
            rank_zero_info(f"merging in memory, not piece by piece: {reason}")
            return self.export(model, output=output, format=format)
        folder = run_dir(self) / "export" if output is None else Path(output)
        path = folder / "merged.safetensors"
        if self.is_global_zero:
            facts = provenance(self, model, merged=False)
            path = stream_suite(model, folder, facts, progress=bool(self.progress_bar_callback))
            write_card(folder, model_card(read_json(folder / "merge.json")))
        self.strategy.barrier()
        rank_zero_info(f"merged network: {path}")
        return path

    def export(
        self,
        model: MergeModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
        output: str | Path | None = None,
        format: ExportFormat = "safetensors",
    ) -> Path:
        """Write the merged network so that it loads without lit-merge, ``merge.json`` and a model card.

        Args:
            model: The merge.
            datamodule: Unlabelled images, for ``buffers: recalibrate`` and for methods that are calibrated with them.
            ckpt_path: Checkpoint of a learned merge.
            output: Folder; by default the folder ``export`` of the run.
            format: ``safetensors``, ``hugging_face`` or ``open_clip``, see :func:`lit_merge.exporting.export_merge`.

        Returns:
            Path of the merged weights.

        Raises:
            MergeError: The method learns and there is no checkpoint.
        """
        if ckpt_path is not None:
            _load(model, Path(ckpt_path))
        model.configure_model()
        merged = model.progress is not None and model.progress.absorbed > 0
        if ckpt_path is None and model.learnable and self.global_step == 0 and not merged:
            raise MergeError(f"{type(model).__name__} has not learned anything yet; give --ckpt_path of its fit")
        if model.needs_images:
            if datamodule is not None:
                datamodule.prepare_data()
                datamodule.setup("test")
            model.calibrate(datamodule)
        folder = run_dir(self) / "export" if output is None else Path(output)
        path, failure = folder, None
        state = model.merged_state() if self.is_global_zero or model.bank.storage.shared else None  # by all ranks
        if self.is_global_zero:
            try:
                path = export_merge(folder, self, model, format, None if ckpt_path is None else Path(ckpt_path), state)
            except Exception as error:  # the others would wait for the file
                failure = error
        found, said = self.strategy.broadcast((str(path), None if failure is None else str(failure)))
        if failure is not None:
            raise failure
        if said is not None:
            raise MergeError(f"rank zero could not write the merged network: {said}")
        rank_zero_info(f"merged network: {found}")
        return Path(found)


def _load(model: MergeModule, path: Path) -> None:
    checkpoint = read_checkpoint(path)
    model.stage_folder = path.parent
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(checkpoint["state_dict"])
