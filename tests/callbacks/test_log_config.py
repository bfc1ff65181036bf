"""Every run has its config, whatever it logs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from commands import TINY, refused, run, wandb_mode

from lit_merge.cli import main

RUN = Path("runs/adamerging/version_0")


def init(path: Path) -> float:
    """The model's option in a saved config."""
    value: float = yaml.safe_load(path.read_text())["model"]["init_args"]["init"]
    return value


def test_two_wandb_runs_in_one_folder() -> None:
    for value in ("0.1", "0.2"):
        with wandb_mode("offline"):
            run("fit", "adamerging", "--config", "wandb", f"--model.init={value}")
    configs = list(Path("runs/lit-merge").glob("*/config.yaml"))
    assert {init(path) for path in configs} == {0.1, 0.2}
    assert len(list(Path("runs/lit-merge").glob("*/report.json"))) == 2
    assert len(list(Path("runs/wandb").glob("offline-run-*/run-*.wandb"))) == 2


def test_two_loggers() -> None:
    Path("both.yaml").write_text(
        "trainer: {logger: [{class_path: RunLogger, init_args: {save_dir: runs, name: adamerging}},"
        " {class_path: WandbLogger, init_args: {save_dir: runs, project: lit-merge}}]}\n"
    )
    with wandb_mode("offline"):
        run("fit", "adamerging", "--config", "both.yaml")
    assert init(RUN / "config.yaml") == 0.3
    assert (RUN / "metrics.csv").is_file()
    assert len(list(Path("runs").rglob("config.yaml"))) == 1 + len(list(Path("runs/wandb").rglob("config.yaml")))
    assert len(list(Path("runs/wandb").glob("offline-run-*/run-*.wandb"))) == 1


def test_no_logger() -> None:
    run("fit", "adamerging", "--trainer.logger=false", "--trainer.default_root_dir=here")
    assert init(Path("here/config.yaml")) == 0.3
    run("fit", "adamerging", "--trainer.logger=false", "--trainer.default_root_dir=here", "--model.init=0.4")
    assert init(Path("here/config.yaml")) == 0.4


def test_an_evaluation_in_the_folder_of_a_fit_leaves_its_config() -> None:
    run("fit", "adamerging", "--model.init=0.4")
    run("test", "adamerging", "--ckpt_path=last")
    assert init(RUN / "config.yaml") == 0.4
    run("fit", "adamerging", "--ckpt_path=last", "--trainer.max_epochs=2", "--model.init=0.4")
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_epochs"] == 2


def test_the_config_of_a_resumed_run_is_what_was_asked_for() -> None:
    run("fit", "adamerging")
    run("fit", "adamerging", "--ckpt_path=last")
    saved = yaml.safe_load((RUN / "config.yaml").read_text())
    assert saved["ckpt_path"] == "last"
    assert saved["trainer"]["logger"]["init_args"]["version"] is None


def test_a_data_free_run_has_one_too_and_export_knows_it() -> None:
    run("merge", "task-arithmetic", "--model.scale=0.2")
    folder = Path("runs/task-arithmetic/version_0")
    saved = (folder / "config.yaml").read_text()
    assert yaml.safe_load(saved)["model"]["init_args"]["scale"] == 0.2
    assert json.loads((folder / "export/merge.json").read_text())["config"] == saved
    main(["merge", "--config", str(folder / "config.yaml")])
    assert (folder.with_name("version_1") / "config.yaml").read_text() == saved


def test_an_error_before_the_run_leaves_no_folder(capsys: pytest.CaptureFixture[str]) -> None:
    refused(capsys, "fit", "--config", "adamerging", *TINY, "--data.batch_size=0", status=1)
    assert not Path("runs").exists()
