"""``lit-merge finetune``: make an expert on one task of a suite."""

from __future__ import annotations

import os
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.table import Table

from lit_merge.callbacks import LogConfig
from lit_merge.checkpoints.reading import read_checkpoint
from lit_merge.cli import MergeCLI
from lit_merge.commands import COMMANDS
from lit_merge.data.finetune_data import FineTuneDataModule
from lit_merge.errors import MergeError
from lit_merge.expert import ExpertModule, write_expert
from lit_merge.parsing import MergeParser
from lit_merge.resume import continue_last_run
from lit_merge.sinks import run_dir
from lit_merge.suites import Suite

__all__ = ("FineTuneCLI", "main")

# the published recipe, as far as it is the Trainer's; test images are looked at once, at the end
_TRAINER = {"max_steps": 2000, "gradient_clip_val": 1.0, "limit_val_batches": 0, "num_sanity_val_steps": 0}
_MODEL, _DATA = "lit_merge.expert.ExpertModule", "lit_merge.data.finetune_data.FineTuneDataModule"


class FineTuneCLI(MergeCLI):
    """One suite and one task for model and data; there are no subcommands."""

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, suite, task, model and data; suite and task are linked into the last two."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{key}": value for key, value in self.trainer_defaults.items()})
        parser.add_subclass_arguments(Suite, "suite", required=True, fail_untyped=False)
        parser.set_defaults({"suite": {"class_path": "lit_merge.suites.MiniSuite"}})
        parser.add_argument("--task", type=str, required=True, help="Task of the suite to make the expert of.")
        parser.add_argument(
            "--output", type=Path | None, help="Folder for the expert; by default the folder expert of the run."
        )
        parser.add_argument(
            "--evaluate", type=bool, default=True, help="Measure the accuracy on test images, of base and expert."
        )
        parser.add_argument(
            "--ckpt_path", type=str | None, help="Checkpoint to go on from; last: that of this task's newest run."
        )
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        parser.set_defaults({"model": {"class_path": _MODEL}, "data": {"class_path": _DATA}})
        for target in ("model", "data"):
            parser.link_arguments("suite", f"{target}.init_args.suite", apply_on="instantiate")
            parser.link_arguments("task", f"{target}.init_args.task")

    def before_instantiate_classes(self) -> None:
        """Give every task runs of its own, find the run that ``--ckpt_path last`` means, and check both paths.

        Raises:
            MergeError: The checkpoint is no checkpoint, or the folder of the output cannot be made.
        """
        self.save_config_kwargs = {**self.save_config_kwargs, "asked": self.config.clone()}
        logger = self.config.trainer.logger
        for one in logger if isinstance(logger, list) else [logger]:
            options = getattr(one, "init_args", None) or {}
            if options.get("version") is None and isinstance(options.get("name"), str):
                options["name"] = f"{options['name']}/{self.config.task}"
        if self.config.ckpt_path == "last":
            continue_last_run(self.config, fresh=True)
        if self.config.ckpt_path:
            _check_checkpoint(self.config.ckpt_path)
        if self.config.output is not None and not self.config.trainer.fast_dev_run:
            _make_folder(Path(self.config.output))

    def make_expert(self) -> Path | None:
        """Fit, measure, and write the expert.

        Returns:
            Path of its weights; ``None`` in a ``fast_dev_run``, which leaves nothing.
        """
        trainer, model, config = self.trainer, self.model, self.config_init
        trainer.fit(model, datamodule=self.datamodule, ckpt_path=config.ckpt_path, weights_only=True)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        folder = run_dir(trainer) / "expert" if config.output is None else config.output
        accuracy = self._accuracies() if config.evaluate else None
        path = Path(folder) / "model.safetensors"
        if trainer.is_global_zero:
            configs = [c.text() for c in trainer.callbacks if isinstance(c, LogConfig)]  # type: ignore[attr-defined]
            more = {"accuracy": accuracy, "config": configs[0] if configs else None}
            path = write_expert(folder, trainer, model, more=more)
            _publish(model.task, accuracy, path)
        return path

    def _accuracies(self) -> dict[str, float]:
        """Accuracy of the base and of the expert on the test images."""
        modules = {"base": ExpertModule(self.model.suite, self.model.task), "expert": self.model}
        for module in modules.values():
            self.trainer.test(module, datamodule=self.datamodule, verbose=False)
        return {name: module.accuracies[self.model.task] for name, module in modules.items()}


def main(args: list[str]) -> None:
    """Run ``lit-merge finetune``.

    Args:
        args: Its arguments.

    Raises:
        SystemExit: Status 2 for wrong usage.
    """
    cli = FineTuneCLI(
        ExpertModule,
        FineTuneDataModule,
        trainer_class=L.Trainer,
        trainer_defaults=_TRAINER,
        parser_class=MergeParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=LogConfig,
        parser_kwargs={"allow_abbrev": False, "prog": "lit-merge finetune", "description": COMMANDS["finetune"]},
        args=args,
        run=False,
    )
    cli.make_expert()


def _check_checkpoint(path: str) -> None:
    """Refuse what is no checkpoint of this command, before the networks are read."""
    checkpoint = read_checkpoint(path)
    origin = checkpoint.get("lit_merge")
    if not isinstance(origin, dict) or "method" not in origin or "pytorch-lightning_version" not in checkpoint:
        raise MergeError(
            f"{path}: expected a checkpoint of lit-merge finetune, found one of something else; give the last.ckpt of "
            "a run of finetune, or start without --ckpt_path"
        )


def _make_folder(folder: Path) -> None:
    """Make the folder of the output now: an error after the training would be a pity."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise MergeError(
            f"output: {folder}: expected a folder that can be made, found: {error.strerror}; give another one"
        ) from error
    if not writable:
        raise MergeError(
            f"output: {folder}: expected a folder to write to, found one without that permission; give another one"
        )


def _publish(task: str, accuracy: dict[str, float] | None, path: Path) -> None:
    console = Console()
    if accuracy is not None:
        table = Table("task", "base", "expert")
        table.add_row(task, *(f"{100 * accuracy[name]:.1f}" for name in ("base", "expert")))
        console.print(table)
    console.print(f"expert: {path}", soft_wrap=True, highlight=False)
