"""All loggers work alike, and a resumed run keeps what it logged."""

from __future__ import annotations

import csv
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from callbacks_helpers import trainer_of
from commands import report, run, wandb_mode
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from toys import ToySuite

from lit_merge.callbacks import ResumePoint
from lit_merge.data import TaskDataModule
from lit_merge.loggers import RunLogger
from lit_merge.methods import AdaMerging

FILES = {"config.yaml", "report.json", "last.ckpt", "coefficients.csv", "coefficients.png", "export"}


def rows(path: str | Path) -> list[dict[str, str]]:
    """What a CSV file says."""
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def logged(path: str | Path, key: str) -> dict[int, float]:
    """Values of a metric by step."""
    return {int(row["step"]): float(row[key]) for row in rows(path) if row.get(key)}


class TestAlike:
    """One fit with each; the numbers are the same, and the files are in the folder of the run."""

    @pytest.fixture(scope="class")
    def expected(self, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp("expected")
        run("fit", "adamerging", "--trainer.logger=false", f"--trainer.default_root_dir={folder}")
        return report(folder)

    def check(self, folder: Path, expected: dict[str, Any]) -> None:
        assert {path.name for path in folder.iterdir()} >= FILES
        found = report(folder)
        assert (found["tasks"], found["mean"]) == (expected["tasks"], expected["mean"])

    @pytest.mark.parametrize("name", ["RunLogger", "CSVLogger"])
    def test_csv(self, name: str, expected: dict[str, Any]) -> None:
        run(
            "fit", "adamerging", f"--trainer.logger={name}", "--trainer.logger.save_dir=logs", "--trainer.logger.name=x"
        )
        folder = Path("logs/x/version_0")
        self.check(folder, expected)
        table = {row["task"]: row for row in rows(folder / "report.csv")}
        assert float(table["mean"]["merged"]) == expected["mean"]["accuracy"]
        assert rows(folder / "predictions-histogram.csv")
        assert logged(folder / "metrics.csv", "test/accuracy")[3] == pytest.approx(expected["mean"]["accuracy"])

    def test_tensorboard(self, expected: dict[str, Any]) -> None:
        pytest.importorskip("tensorboard")
        EventAccumulator = import_module("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
        options = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=logs", "--trainer.logger.name=x"]
        run("fit", "adamerging", *options)
        folder = Path("logs/x/version_0")
        self.check(folder, expected)
        events = EventAccumulator(str(folder)).Reload()
        assert events.Scalars("test/accuracy")[-1].value == pytest.approx(expected["mean"]["accuracy"])
        assert "coefficients" in events.Tags()["images"]
        (table,) = events.Tensors("report/text_summary")[-1].tensor_proto.string_val
        assert b"| mean |" in table
        assert len(table.decode().splitlines()) == 2 + 4

    def test_wandb_offline(self, expected: dict[str, Any]) -> None:
        with wandb_mode("offline"):
            logger = run("fit", "adamerging", "--config", "wandb").trainer.logger
            assert isinstance(logger, WandbLogger)
            summary, config = dict(logger.experiment.summary), dict(logger.experiment.config)
        self.check(Path("runs/lit-merge") / str(logger.version), expected)
        assert summary["test/accuracy"] == pytest.approx(expected["mean"]["accuracy"])
        assert config["config"]["model"]["class_path"] == "lit_merge.methods.AdaMerging"
        (media,) = Path("runs/wandb").glob("offline-run-*/files/media")
        assert list(media.glob("table/report*.table.json"))
        assert list(media.glob("images/coefficients*.png"))

    def test_wandb_disabled(self, expected: dict[str, Any]) -> None:
        with wandb_mode("disabled"):
            run("fit", "adamerging", "--config", "wandb")
        (folder,) = Path("runs/lit-merge").iterdir()
        self.check(folder, expected)
        assert not list(Path("runs").rglob("*.wandb"))

    def test_the_default_run_does_not_touch_wandb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(wandb, "init", lambda *args, **kwargs: pytest.fail("asked for W&B"))
        monkeypatch.setattr(sys, "stdin", None)
        run("fit", "adamerging")
        assert report("runs/adamerging/version_0")


class TestRunLogger:
    def test_it_is_a_csv_logger(self) -> None:
        logger = RunLogger()
        assert isinstance(logger, CSVLogger)
        assert logger.log_dir == "runs/lit-merge/version_0"

    def test_goes_on(self) -> None:
        first = RunLogger("runs", "x", version=0)
        first.log_metrics({"a": 1.0}, 1)
        first.log_metrics({"a": 2.0}, 2)
        first.save()
        second = RunLogger("runs", "x", version=0)
        second.log_metrics({"a": 3.0, "b": torch.tensor(7.0)}, 3)
        second.save()
        assert logged("runs/x/version_0/metrics.csv", "a") == {1: 1.0, 2: 2.0, 3: 3.0}
        assert logged("runs/x/version_0/metrics.csv", "b") == {3: 7.0}

    def test_a_step_that_is_taken_again_has_one_row(self) -> None:
        for value in (1.0, 2.0):
            logger = RunLogger("runs", "x", version=0)
            logger.log_metrics({"a": value}, 5)
            logger.log_metrics({"b": value}, 5)
            logger.finalize("success")
        assert len(rows("runs/x/version_0/metrics.csv")) == 2
        assert logged("runs/x/version_0/metrics.csv", "a") == {5: 2.0}

    def test_nothing_logged_leaves_what_is_there(self) -> None:
        first = RunLogger("runs", "x", version=0)
        first.log_metrics({"a": 1.0}, 1)
        first.save()
        RunLogger("runs", "x", version=0).experiment.save()
        assert logged("runs/x/version_0/metrics.csv", "a") == {1: 1.0}

    def test_a_new_run_has_its_own_folder(self) -> None:
        first = RunLogger("runs", "x")
        first.log_metrics({"a": 1.0}, 1)
        first.save()
        assert RunLogger("runs", "x").version == 1

    def test_no_warning_that_logs_are_deleted(self, recwarn: pytest.WarningsRecorder) -> None:
        for _ in range(2):
            logger = RunLogger("runs", "x", version=0)
            logger.log_metrics({"a": 1.0}, 1)
            logger.save()
        assert not [w for w in recwarn if "deleted" in str(w.message)]

    def test_a_resumed_run_keeps_its_metrics(self) -> None:
        run("fit", "adamerging", "--trainer.log_every_n_steps=1")
        path = "runs/adamerging/version_0/metrics.csv"
        before = logged(path, "train/loss")
        assert list(before) == [0, 1, 2]
        run("fit", "adamerging", "--trainer.log_every_n_steps=1", "--ckpt_path=last", "--trainer.max_epochs=2")
        after = logged(path, "train/loss")
        assert list(after) == [0, 1, 2, 3, 4, 5]
        assert {step: after[step] for step in before} == before
        run("test", "adamerging", "--ckpt_path=last")
        assert logged(path, "train/loss") == after

    def test_a_checkpoint_comes_after_the_metrics_before_it(self) -> None:
        suite = ToySuite("mlp")
        logger = RunLogger("runs", "x", version=0, flush_logs_every_n_steps=1000)
        seen: list[int] = []

        class Look(ResumePoint):
            def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
                super().on_train_epoch_end(trainer, pl_module)
                seen.append(len(logged("runs/x/version_0/metrics.csv", "train/loss")))

        trainer = trainer_of(Look(), logger=logger, max_epochs=2, log_every_n_steps=1, enable_checkpointing=True)
        trainer.fit(AdaMerging(suite=suite), datamodule=TaskDataModule(suite=suite, steps_per_epoch=3))
        assert seen == [3, 6]
