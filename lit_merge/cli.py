"""The command line: LightningCLI with bundled configs, one suite for model and data, and errors that help."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lit_merge import __version__
from lit_merge.callbacks import LogConfig
from lit_merge.checkpoints.reading import read_checkpoint
from lit_merge.commands import COMMANDS, run_command
from lit_merge.data import TaskDataModule
from lit_merge.errors import MergeError, MissingExtraError
from lit_merge.lost_ranks import is_lost_peer
from lit_merge.module import MergeModule
from lit_merge.parsing import BundledConfigFile, MergeParser
from lit_merge.predictions import write_predictions
from lit_merge.quiet import quiet
from lit_merge.resume import continue_last_run
from lit_merge.suites import Suite
from lit_merge.trainer import MergeTrainer

__all__ = ("MergeCLI", "main")

# what a config may name by its bare class name
_REGISTRY = ("attacks", "methods", "objectives", "transforms", "suites", "data", "callbacks", "loggers")


class MergeCLI(LightningCLI):
    """``lit-merge``: the suite is given once and feeds model and data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        given = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        self._asked = str(given[0]) if isinstance(given, list) and given else ""
        super().__init__(*args, **kwargs)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and those of :class:`~lit_merge.MergeTrainer`."""
        known = {"model", "datamodule"}
        loaders = {"train_dataloaders", "val_dataloaders", "dataloaders"}
        return {
            **dict.fromkeys(("fit", "validate", "test", "predict"), known | loaders),
            "merge": known,
            "export": known,
        }

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:  # noqa: ANN401
        """Make the parser of the subcommand that is asked for; that of every one only where none of them is known."""
        every = self.subcommands()
        if (asked := self._asked) in every:
            self.subcommands = lambda: {asked: every[asked]}  # type: ignore[method-assign]
        super()._add_subcommands(parser, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:  # noqa: ANN401
        """Make the parser with bundled configs."""
        kwargs.setdefault("dump_header", [f"lit-merge=={__version__}", f"lightning=={L.__version__}"])
        parser: LightningArgumentParser = self.parser_class(**kwargs)
        parser.add_argument(
            "-c", "--config", action=BundledConfigFile, help="YAML file, or name of a bundled config; repeatable."
        )
        return parser

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add trainer, suite, model and data; the suite is linked into the last two."""
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults(
            {f"trainer.{key}": value for key, value in self.trainer_defaults.items() if key != "callbacks"}
        )
        # torchvision's Compose and most of its transforms have no annotations
        parser.add_subclass_arguments(Suite, "suite", required=True, fail_untyped=False)
        parser.set_defaults({"suite": {"class_path": "lit_merge.suites.MiniSuite"}})
        parser.add_lightning_class_args(self._model_class, "model", subclass_mode=True)
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True, required=False)
        parser.set_defaults({"data": {"class_path": "lit_merge.data.TaskDataModule"}})
        for target in ("model", "data"):
            parser.link_arguments("suite", f"{target}.init_args.suite", apply_on="instantiate")

    def _parse_ckpt_path(self) -> None:
        """Leave the config alone: it, not the checkpoint, is the one source of hyper-parameters."""

    def before_instantiate_classes(self) -> None:
        """Note the config as it was asked for, then find the run that ``--ckpt_path last`` means."""
        if self.subcommand is None:
            return
        config = self.config[self.subcommand]
        self.save_config_kwargs = {**self.save_config_kwargs, "asked": config.clone()}
        if config.get("ckpt_path") == "last":
            continue_last_run(config, fresh=self.subcommand == "fit")
        if path := config.get("ckpt_path"):
            read_checkpoint(path)  # a few kilobytes; an error comes before the networks are read

    def after_fit(self) -> None:
        """Evaluate what was learned, beside base and experts."""
        if not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)

    def validate(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Run ``Trainer.validate`` without its own table: the report has one."""
        self._say_if_unlearned(kwargs)
        self.trainer.validate(**{**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Run ``Trainer.test`` without its own table: the report has one."""
        self._say_if_unlearned(kwargs)
        self.trainer.test(**{**kwargs, "verbose": False})

    def predict(self, **kwargs: Any) -> None:  # noqa: ANN401
        """Run ``Trainer.predict`` and write ``predictions.csv`` into the run's folder."""
        self._say_if_unlearned(kwargs)
        outputs = self.trainer.predict(**{**kwargs, "return_predictions": True})
        rank_zero_info(f"predictions: {write_predictions(self.trainer, outputs)}")

    def _say_if_unlearned(self, kwargs: dict[str, Any]) -> None:
        if isinstance(self.model, MergeModule) and self.model.learnable and kwargs.get("ckpt_path") is None:
            name = type(self.model).__name__
            rank_zero_warn(f"{name} learns its merge, and these are its starting values; give --ckpt_path of its fit")


def main(args: ArgsType | Sequence[str] = None, *, run: bool = True) -> MergeCLI | None:
    """Run the command line.

    Args:
        args: Arguments; by default those of the process.
        run: Run the subcommand; otherwise only parse and instantiate, without a subcommand.

    Returns:
        The CLI with its ``trainer``, ``model`` and ``datamodule``; nothing for a command of :mod:`lit_merge.commands`.

    Raises:
        SystemExit: Status 2 for wrong usage, 1 for an error while running; the message is on standard error. With
            ``--debug`` the error itself is raised.
    """
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if debug and args is None:
        sys.argv.remove("--debug")  # processes started for further devices repeat the command line
        os.environ["LIT_MERGE_DEBUG"] = "1"
    _register()
    try:
        with quiet():
            if given and given[0] in COMMANDS:
                run_command(given[0], given[1:])
                return None
            if given[:1] == ["merge"] and _is_of_weights(given[1:]):
                run_command("merge_weights", given[1:])
                return None
            return _cli(None if args is None else given, run)
    except Exception as raised:
        if debug or os.environ.get("LIT_MERGE_DEBUG"):
            raise
        error = _cause(raised)
        message = "\n       ".join([str(error).strip() or type(error).__name__, *getattr(error, "__notes__", ())])
        kind = "" if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: "
        if is_lost_peer(raised) and not isinstance(error, MergeError):
            message, kind = "another rank of this run has ended; if it does not say why, it was killed", ""
        sys.stderr.write(f"error: {kind}{message}\n       (--debug shows the traceback)\n")
        raise SystemExit(1) from error


def _is_of_weights(args: list[str]) -> bool:
    """Whether a merge is of folders of weights, without a suite: its arguments or its config name experts."""
    names = [text.partition("=")[0] for text in args]
    if "--base" in names or "--experts" in names:
        return True
    for name, text, value in zip(names, args, [*args[1:], ""], strict=True):
        path = Path(text.partition("=")[2] if "=" in text else value)
        if name in ("-c", "--config") and path.is_file():
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (yaml.YAMLError, UnicodeDecodeError, OSError):
                continue  # the parser says what is wrong with it
            if isinstance(content, dict) and "experts" in content:
                return True
    return False


def _cause(error: BaseException) -> BaseException:
    """Return the clear error inside of one of the parser, which would add pages of types and values."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, MergeError | MissingExtraError):
            return inner
        inner = inner.__cause__ or inner.__context__
    return error


def _cli(args: list[str] | None, run: bool) -> MergeCLI:
    return MergeCLI(
        MergeModule,
        TaskDataModule,
        trainer_class=MergeTrainer,
        parser_class=MergeParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        seed_everything_default=0,
        auto_configure_optimizers=False,
        save_config_callback=LogConfig,
        parser_kwargs={"allow_abbrev": False, "prog": "lit-merge"},
        args=args,
        run=run,
    )


def _register() -> None:
    """Import what configs may name; other packages join through the entry point group ``lit_merge.plugins``."""
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # methods of one's own; last, so that nothing is shadowed
    for module in _REGISTRY:
        import_module(f"lit_merge.{module}")
    for plugin in entry_points(group="lit_merge.plugins"):
        plugin.load()
